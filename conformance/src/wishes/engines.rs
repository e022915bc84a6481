//! config.json as each engine writes it: it starts, and a probe inside finds what was asked for.

use anyhow::{Context, Result, ensure};

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::{Config, engines};
use crate::world::World;

/// Prints one fact a line; what is missing is an empty line.
const PROBE: &str =
    "grep -E '^(CapBnd|CapEff|CapAmb|NoNewPrivs)' /proc/self/status | tr -d '\\t' | tr '\\n' ' '; echo
    cat /proc/self/oom_score_adj
    ls /proc/interrupts /proc/sys/kernel/ostype /dev/null /dev/ptmx /dev/shm > /dev/null && echo there
    head -c 1 /proc/interrupts | wc -c
    (: > /proc/sys/kernel/shmmax) 2> /dev/null || echo read-only
    cat /proc/sys/net/ipv4/ping_group_range | tr '\\t' ' '
    echo x > /dev/null && head -c 1 /dev/urandom | wc -c
    cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max 2> /dev/null | tr '\\n' ' '; echo
    ulimit -n; umask";

/// Every case of this subject.
pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "engines/what-docker-sends-starts-and-holds", |world| {
            probe(
                world,
                engines::docker(PROBE),
                &[
                    "CapEff:00000000a80425fb CapBnd:00000000a80425fb CapAmb:0000000000000000 NoNewPrivs:0 ",
                    "0",
                    "there",
                    "0",
                    "read-only",
                    "0 2147483647",
                    "1",
                    "134217728 60 ",
                ],
            )
        }),
        wish(At::Vm, "engines/what-podman-sends-starts-and-holds", |world| {
            probe(
                world,
                engines::podman(PROBE),
                &[
                    "CapEff:00000000800405fb CapBnd:00000000800405fb CapAmb:0000000000000000 NoNewPrivs:0 ",
                    "200",
                    "there",
                    "0",
                    "read-only",
                    "0 0",
                    "1",
                    "134217728 2048 ",
                    "1048576",
                    "0022",
                ],
            )
        }),
        wish(At::Both, "engines/what-containerd-sends-starts-and-holds", |world| {
            probe(
                world,
                engines::containerd(PROBE),
                &[
                    "CapEff:00000000a80425fb CapBnd:00000000a80425fb CapAmb:0000000000000000 NoNewPrivs:1 ",
                    "984",
                    "there",
                    "0",
                    "read-only",
                    "1 0",
                    "1",
                    "134217728 max ",
                ],
            )
        }),
        wish(At::Vm, "engines/what-cri-o-sends-starts-and-holds", |world| {
            probe(
                world,
                engines::crio(PROBE),
                &[
                    "CapEff:00000000800405fb CapBnd:00000000800405fb CapAmb:0000000000000000 NoNewPrivs:0 ",
                    "-997",
                    "there",
                    "0",
                    "read-only",
                    "1 0",
                    "1",
                    "134217728 max ",
                ],
            )
        }),
    ]
}

fn probe(world: &'static World, config: Config, expected: &[&str]) -> Result<()> {
    // Where there are no VMs, this machine's cgroups stand in for the guest's, and may lack controllers.
    let config = if world.is_vm() {
        config
    } else {
        config
            .without("/linux/resources/memory")
            .without("/linux/resources/cpu")
            .without("/linux/resources/pids")
            .without("/linux/resources/unified")
            .without("/linux/resources/hugepageLimits")
    };
    let output = world.run(&world.bundle(&config)?, b"")?.code(0)?;
    let text = output.text();
    let mut lines = text.lines();
    for fact in expected {
        let line = lines.next().with_context(|| format!("no line for {fact:?} in {text:?}"))?;
        if world.is_vm() || !fact.starts_with("134217728") {
            same(&line, fact)?;
        }
    }
    let unexpected: Vec<_> = output.stderr.lines().filter(|line| !line.contains("is ignored")).collect();
    ensure!(unexpected.is_empty(), "{unexpected:?}");
    Ok(())
}
