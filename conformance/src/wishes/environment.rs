//! What a process finds: user, environment, limits, capabilities, names.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::bench::{Bench, plain_process};
use super::run::same;
use crate::cases::{At, Case, Wish, wish};
use crate::config::Config;
use crate::world::World;

/// Wishes for the bench.
pub const SHARED: &[Wish<Bench>] = &[
    ("process/the-first-is-pid-1-of-its-namespace", |bench| {
        same(
            &bench.container.sh("tr '\\0' ' ' </proc/1/cmdline")?,
            &"sh -c trap 'exit 0' TERM; sleep 100000 & wait ".trim_end().into(),
        )
    }),
    ("process/environment-is-as-asked-plus-home", |bench| {
        let text = bench.container.sh("tr '\\0' '\\n' </proc/1/environ | sort")?;
        same(&text, &"FROM_CONFIG=yes\nHOME=/root\nPATH=/usr/sbin:/usr/bin:/sbin:/bin".into())
    }),
    ("process/user-groups-and-umask-are-as-asked", |bench| {
        bench.container.says(
            "grep -E '^(Uid|Gid|Groups|Umask)' /proc/1/status | tr '\\t' ' ' | tr -s ' ' | sed 's/ *$//'",
            "Umask: 0027\nUid: 0 0 0 0\nGid: 0 0 0 0\nGroups: 10 20",
        )
    }),
    ("process/umask-is-022-where-none-is-asked-for", |bench| {
        same(&bench.says_as(plain_process(), "umask")?, &"0022".into())
    }),
    ("process/rlimits-are-as-asked", |bench| {
        bench
            .container
            .says("grep 'open files' /proc/1/limits | tr -s ' '", "Max open files 512 1024 files")?;
        bench.container.says("ulimit -n; ulimit -H -n", "512\n1024")
    }),
    ("process/capabilities-are-as-asked", capabilities),
    ("process/every-capability-set-is-its-own", capability_sets),
    ("process/an-unprivileged-user-has-no-capability", |bench| {
        let mut process = plain_process();
        process["user"] = json!({ "uid": 65534, "gid": 65534 });
        process["capabilities"] = json!({ "bounding": ["CAP_CHOWN"], "permitted": [], "effective": [] });
        let said = bench.says_as(
            process,
            "grep -E 'Cap(Prm|Eff|Inh|Amb)' /proc/self/status | cut -f 2 | sort -u; echo $HOME",
        )?;
        same(&said, &"0000000000000000\n/".into())
    }),
    ("process/ambient-capabilities-reach-an-unprivileged-user", |bench| {
        let mut process = plain_process();
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
        let set = json!(["CAP_NET_BIND_SERVICE"]);
        process["capabilities"] = json!({ "bounding": set, "permitted": set, "effective": set, "inheritable": set, "ambient": set });
        let said =
            bench.says_as(process, "grep -E 'Cap(Prm|Eff|Amb)' /proc/self/status | cut -f 2 | sort -u")?;
        same(&said, &"0000000000000400".into())
    }),
    ("process/no-new-privileges-is-as-asked", |bench| {
        bench.container.says("grep NoNewPrivs /proc/1/status | cut -f 2", "1")?;
        let said = bench.says_as(plain_process(), "grep NoNewPrivs /proc/self/status | cut -f 2")?;
        same(&said, &"0".into())
    }),
    ("process/oom-score-is-as-asked", |bench| bench.container.says("cat /proc/1/oom_score_adj", "100")),
    ("process/hostname-and-domainname-are-as-asked", |bench| {
        bench.container.says("hostname; cat /proc/sys/kernel/domainname", "conformance\nexample.org")
    }),
    ("process/home-comes-from-the-containers-passwd", |bench| {
        let mut process = plain_process();
        process["user"] = json!({ "uid": 65534, "gid": 65534 });
        same(&bench.says_as(process.clone(), "echo $HOME")?, &"/".into())?;
        process["env"] = json!(["PATH=/bin", "HOME=/given"]);
        same(&bench.says_as(process, "echo $HOME")?, &"/given".into())?;
        same(&bench.says_as(plain_process(), "echo $HOME")?, &"/root".into())
    }),
    ("process/its-own-path-is-searched", |bench| {
        let mut process = plain_process();
        process["env"] = json!(["PATH=/nowhere:/opt/tools:/bin"]);
        process["args"] = json!(["only-here"]);
        same(&bench.process(&process)?.code(0)?.text(), &"found only here\n".into())
    }),
    ("process/a-relative-program-is-found-from-its-cwd", |bench| {
        let mut process = plain_process();
        process["cwd"] = json!("/opt");
        process["args"] = json!(["tools/only-here"]);
        same(&bench.process(&process)?.code(0)?.text(), &"found only here\n".into())
    }),
    ("process/descriptors-are-three", |bench| {
        // The fourth is ls's own, on the directory that it lists.
        bench.container.says("ls /proc/self/fd", "0\n1\n2\n3")?;
        bench.container.says("ls /proc/1/fd | wc -l", "3")
    }),
    ("process/signals-are-neither-blocked-nor-ignored", |bench| {
        let all = "grep -hE 'Sig(Blk|Ign)' /proc/self/status";
        let said = bench.container.exec(&["sh", "-c", &format!("exec {all}")])?.code(0)?.text();
        ensure!(said.lines().all(|line| line.ends_with("0000000000000000")), "{said}");
        Ok(())
    }),
    ("process/it-leads-its-own-session", |bench| {
        bench
            .container
            .says("set -- $(cat /proc/self/stat); [ $6 != 0 ] && cut -d ' ' -f 6 /proc/1/stat", "1")
    }),
];

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Both, "process/user-cwd-and-umask-of-the-first", first),
        wish(At::Local, "process/a-missing-cwd-of-the-first-is-made", missing_cwd),
        wish(At::Local, "process/no-capabilities-means-none", no_capabilities),
        wish(At::Local, "process/every-rlimit-can-be-set", all_limits),
        wish(At::Both, "process/without-hostname-it-is-the-hosts", without_hostname),
        wish(At::Local, "process/a-huge-environment-arrives", huge),
    ]
}

fn capabilities(bench: &mut Bench) -> Result<()> {
    // CHOWN 0, KILL 5, SETGID 6, SETUID 7, NET_BIND_SERVICE 10.
    let wanted = "00000000000004e1";
    let none = "0000000000000000";
    let script = "for c in Bnd Eff Prm Inh Amb; do grep Cap$c /proc/1/status | cut -f 2; done";
    bench.container.says(script, &[wanted, wanted, wanted, none, none].join("\n"))?;
    let own = script.replace("/proc/1/", "/proc/self/");
    bench.container.says(&own, &[wanted, wanted, wanted, none, none].join("\n"))
}

fn capability_sets(bench: &mut Bench) -> Result<()> {
    let mut process = plain_process();
    process["user"] = json!({ "uid": 0, "gid": 0 });
    process["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"]
    });
    // execve gives uid 0 what bounding and inheritable allow, as it does under any runtime.
    let said =
        bench.says_as(process, "for c in Bnd Inh Amb; do grep Cap$c /proc/self/status | cut -f 2; done")?;
    let lines: Vec<&str> = said.lines().collect();
    same(&lines[..2].to_vec(), &vec!["0000000000200021", "0000000000000020"])
}

fn first(world: &'static World) -> Result<()> {
    let config = Config::sh(
        "id -u; id -g; id -G; umask; pwd; echo $HOME; touch /tmp/mine && stat -c '%u %g %a' /tmp/mine",
    )
    .set("/process/user", json!({ "uid": 1234, "gid": 2345, "additionalGids": [3456], "umask": 0o77 }))
    .set("/process/cwd", json!("/etc"))
    .mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]);
    let expected = "1234\n2345\n2345 3456\n0077\n/etc\n/\n1234 2345 600\n";
    same(&world.run_config(&config)?, &expected.into())
}

fn missing_cwd(world: &'static World) -> Result<()> {
    let bundle = world.own_bundle(&Config::sh("pwd").set("/process/cwd", json!("/made/for/me")))?;
    let output = world.run(&bundle, b"")?.code(0)?.quiet()?;
    same(&output.text(), &"/made/for/me\n".into())
}

fn no_capabilities(world: &'static World) -> Result<()> {
    let script = "grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | cut -f 2 | sort -u";
    let config = Config::sh(script).without("/process/capabilities");
    same(&world.run_config(&config)?, &"0000000000000000\n".into())
}

fn all_limits(world: &'static World) -> Result<()> {
    let names = [
        ("CPU", "cpu time"),
        ("FSIZE", "file size"),
        ("DATA", "data size"),
        ("STACK", "stack size"),
        ("CORE", "core file size"),
        ("RSS", "resident set"),
        ("NPROC", "processes"),
        ("NOFILE", "open files"),
        ("MEMLOCK", "locked memory"),
        ("AS", "address space"),
        ("LOCKS", "file locks"),
        ("SIGPENDING", "pending signals"),
        ("MSGQUEUE", "msgqueue size"),
        ("NICE", "nice priority"),
        ("RTPRIO", "realtime priority"),
        ("RTTIME", "realtime timeout"),
    ];
    let value = |n: usize| match names[n].0 {
        // Not above any kernel's defaults: raising a hard limit takes a privilege that a nested host may not have.
        "NICE" | "RTPRIO" => 0,
        "NOFILE" | "NPROC" | "SIGPENDING" => 100 + n,
        "MEMLOCK" | "MSGQUEUE" => 50_000 + n,
        _ => 900_000_000 + n,
    };
    let hard = |n: usize| if value(n) == 0 { 0 } else { value(n) + 1 };
    let limits: Vec<_> = (0..names.len())
        .map(|n| json!({ "type": format!("RLIMIT_{}", names[n].0), "soft": value(n), "hard": hard(n) }))
        .collect();
    let said =
        world.run_config(&Config::sh("cat /proc/self/limits").set("/process/rlimits", json!(limits)))?;
    for (n, (_, words)) in names.iter().enumerate() {
        let line =
            said.lines().find(|line| line.contains(words)).with_context(|| format!("{words} in {said}"))?;
        let numbers: Vec<&str> =
            line.split_whitespace().filter(|word| word.parse::<usize>().is_ok()).collect();
        same(&numbers, &vec![value(n).to_string().as_str(), hard(n).to_string().as_str()])
            .with_context(|| words.to_string())?;
    }
    Ok(())
}

/// So it is in a new namespace, which begins as a copy, and without any.
fn without_hostname(world: &'static World) -> Result<()> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    let new = Config::sh("hostname").without("/hostname");
    let kinds = ["pid", "network", "ipc", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    let none = new.clone().set("/linux/namespaces", json!(kinds));
    same(&world.run_config(&new)?, &host)?;
    same(&world.run_config(&none)?, &host)
}

fn huge(world: &'static World) -> Result<()> {
    let value = "v".repeat(1000);
    let mut env: Vec<String> = (0..200).map(|n| format!("VARIABLE_{n}={value}{n}")).collect();
    env.push("PATH=/bin".into());
    let config = Config::sh("env | grep -c ^VARIABLE_; env | grep ^VARIABLE_199= | wc -c")
        .set("/process/env", json!(env));
    same(&world.run_config(&config)?, &"200\n1017\n".into())
}
