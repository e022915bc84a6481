//! config.json as each engine writes it: it starts, and a probe inside proves each field, by what that field says.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::apparmor::{self, Profile};
use crate::cases::{At, Case, group};
use crate::config::{Config, engines};
use crate::world::World;

const DOCKER: &str = include_str!("../../profiles/docker.json");
const PODMAN: &str = include_str!("../../profiles/podman.json");

/// An engine's document, its filter of system calls, and whether that keeps user namespaces from being made.
type Engine = (At, &'static str, fn(&str) -> Config, &'static str, bool);

const ENGINES: [Engine; 4] = [
    (At::Both, "engines/what-docker-sends-starts-and-holds", engines::docker, DOCKER, true),
    (At::Vm, "engines/what-podman-sends-starts-and-holds", engines::podman, PODMAN, false),
    (At::Both, "engines/what-containerd-sends-starts-and-holds", engines::containerd, DOCKER, true),
    (At::Vm, "engines/what-cri-o-sends-starts-and-holds", engines::crio, PODMAN, false),
];

/// Every case of this subject.
pub fn cases() -> Vec<Case> {
    let case = |engine: &'static Engine| {
        let (at, name, ..) = *engine;
        group(at, Ok, vec![(name, Box::new(|world: &mut &'static World| probe(world, engine)))])
    };
    ENGINES.iter().map(case).collect()
}

fn probe(world: &'static World, (_, _, config, filter, bars_users): &Engine) -> Result<()> {
    let mut wanted = config("").set("/linux/seccomp", serde_json::from_str(filter)?);
    if !world.is_vm() {
        // This machine's cgroups stand in for the guest's, and may lack controllers.
        for field in ["memory", "cpu", "pids", "unified", "hugepageLimits"] {
            wanted = wanted.without(&format!("/linux/resources/{field}"));
        }
    }
    let confines = world.is_vm() && apparmor::is_enabled();
    let profile = wanted.value()["process"]["apparmorProfile"].as_str().filter(|_| confines);
    let _profile = profile.map(|name| Profile::load(world, name)).transpose()?;
    let mut facts = Facts::default();
    facts.of(wanted.value());
    let user = "unshare -U true 2>/dev/null && echo made || echo barred";
    facts.add("a user namespace", user, if *bars_users { "barred" } else { "made" });
    let script: String =
        facts.0.iter().map(|fact| format!("{{ {}\n}} | tr '\\n' '~'; echo\n", fact.script)).collect();
    let config = wanted.set("/process/args", serde_json::json!(["sh", "-c", script]));
    let output = world.run(&world.bundle(&config)?, b"")?.code(0)?;
    let text = output.text();
    let mut found = text.lines().map(|line| line.trim_end_matches('~'));
    for fact in &facts.0 {
        let line = found.next().with_context(|| format!("no line for {} in {text:?}", fact.name))?;
        ensure!(line == fact.expected, "{}: {line:?}, not {:?}", fact.name, fact.expected);
    }
    let unexpected: Vec<_> = output.stderr.lines().filter(|line| !line.contains("is ignored")).collect();
    ensure!(unexpected.is_empty(), "{unexpected:?}");
    Ok(())
}

/// What a script says inside if a field holds; its lines are joined by `~`.
struct Fact {
    name: String,
    script: String,
    expected: String,
}

#[derive(Default)]
struct Facts(Vec<Fact>);

/// The options of the topmost mount at a place, `fs-type,own options,super block's options`.
const OPTIONS: &str = "sed -n 's|^[^ ]* [^ ]* [^ ]* [^ ]* PLACE \\([^ ]*\\) .*- \\([^ ]*\\) [^ ]* \\(.*\\)$|\\2,\\1,\\3|p' \
                       /proc/self/mountinfo | tail -n 1";

impl Facts {
    fn add(&mut self, name: &str, script: impl Into<String>, expected: impl Into<String>) {
        self.0.push(Fact { name: name.into(), script: script.into(), expected: expected.into() });
    }

    fn of(&mut self, config: &Value) {
        self.process(&config["process"]);
        self.add("hostname", "hostname", text(&config["hostname"]));
        list(&config["mounts"]).for_each(|mount| self.mount(mount));
        let linux = &config["linux"];
        for path in list(&linux["maskedPaths"]).map(text) {
            let script =
                format!("if [ -d {path} ]; then ls -A {path}; else head -c 1 {path} 2>/dev/null; fi | wc -c");
            self.add(&format!("maskedPaths: {path}"), script, "0");
        }
        for path in list(&linux["readonlyPaths"]).map(text) {
            let options = OPTIONS.replace("PLACE", &path);
            let script =
                format!("if [ -e {path} ]; then {options} | grep -o ,ro, | head -n 1; else echo ,ro,; fi");
            self.add(&format!("readonlyPaths: {path}"), script, ",ro,");
        }
        for (name, value) in entries(&linux["sysctl"]) {
            let script = format!("cat /proc/sys/{} | tr '\\t' ' '", name.replace('.', "/"));
            self.add(name, script, text(value));
        }
        self.resources(&linux["resources"]);
    }

    fn process(&mut self, process: &Value) {
        let status = |field: &str| format!("sed -n 's/^{field}:\\t//p' /proc/self/status");
        for (set, field) in [
            ("bounding", "CapBnd"),
            ("effective", "CapEff"),
            ("permitted", "CapPrm"),
            ("inheritable", "CapInh"),
            ("ambient", "CapAmb"),
        ] {
            let mask =
                list(&process["capabilities"][set]).fold(0u64, |mask, name| mask | 1 << number(&text(name)));
            self.add(set, status(field), format!("{mask:016x}"));
        }
        let no_new_privileges = process["noNewPrivileges"] == true;
        self.add("noNewPrivileges", status("NoNewPrivs"), if no_new_privileges { "1" } else { "0" });
        self.add("seccomp", status("Seccomp"), "2");
        self.add("oomScoreAdj", "cat /proc/self/oom_score_adj", process["oomScoreAdj"].to_string());
        let user = &process["user"];
        self.add("user", "id -u; id -g", format!("{}~{}", user["uid"], user["gid"]));
        let groups = list(&user["additionalGids"]).map(|gid| gid.to_string()).collect::<Vec<_>>().join(" ");
        self.add("additionalGids", format!("{} | xargs echo", status("Groups")), groups);
        self.add("umask", "umask", format!("{:04o}", user["umask"].as_u64().unwrap_or(0o22)));
        self.add("cwd", "pwd", text(&process["cwd"]));
        for entry in list(&process["env"]).map(text) {
            let name = entry.split('=').next().unwrap_or_default();
            self.add(name, format!("env | grep '^{name}='"), entry.clone());
        }
        for limit in list(&process["rlimits"]) {
            let kind = text(&limit["type"]);
            let title = if kind == "RLIMIT_NOFILE" { "Max open files" } else { "Max processes" };
            let script =
                format!("sed -n 's/^{title} *//p' /proc/self/limits | tr -s ' ' | cut -d ' ' -f 1,2");
            self.add(&kind, script, format!("{} {}", limit["soft"], limit["hard"]));
        }
    }

    fn mount(&mut self, mount: &Value) {
        let place = text(&mount["destination"]);
        // The guest kernel may lack message queues: a tmpfs is there then. The only cgroup is of version 2.
        let kind = match text(&mount["type"]).as_str() {
            "mqueue" => "\\(mqueue\\|tmpfs\\)".to_string(),
            "cgroup" => "cgroup2\\?".to_string(),
            other => other.to_string(),
        };
        let mut flags = Vec::new();
        for option in list(&mount["options"]).map(text) {
            match option.split_once('=') {
                Some(("size", size)) => {
                    let script = format!("df -k {place} | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2");
                    self.add(&format!("{place}: size"), script, size.trim_end_matches('k'));
                }
                Some(("mode", mode)) if kind == "tmpfs" => {
                    self.add(&format!("{place}: mode"), format!("stat -c %a {place}"), mode);
                }
                Some((name, value)) => flags.push(format!("{name}={}", value.trim_start_matches('0'))),
                None if ["newinstance", "strictatime"].contains(&option.as_str()) => {}
                None => flags.push(option),
            }
        }
        let options = OPTIONS.replace("PLACE", &place);
        let looks: String =
            flags.iter().map(|flag| format!("; echo \"$o\" | grep -o ,{flag}, | head -n 1")).collect();
        let script = format!("o=,$({options}),; echo \"$o\" | grep -c '^,{kind},' {looks}");
        let expected: String = flags.iter().map(|flag| format!("~,{flag},")).collect();
        self.add(&place, script, format!("1{expected}"));
    }

    fn resources(&mut self, resources: &Value) {
        let mut file = |name: &str, value: String| {
            // A kernel that cannot swap has no limit of it, and nothing to swap to.
            let none = "awk '/^SwapTotal/ { print $2 }' /proc/meminfo";
            let script = match name {
                "memory.swap.max" => format!("cat /sys/fs/cgroup/{name} 2>/dev/null || {none}"),
                name => format!("cat /sys/fs/cgroup/{name}"),
            };
            self.add(name, script, value);
        };
        let memory = &resources["memory"];
        if let Some(limit) = memory["limit"].as_u64() {
            file("memory.max", limit.to_string());
        }
        let cpu = &resources["cpu"];
        if !cpu["quota"].is_null() {
            file("cpu.max", format!("{} {}", cpu["quota"], cpu["period"]));
        }
        if let Some(shares) = cpu["shares"].as_u64() {
            file("cpu.weight", (1 + (shares - 2) * 9999 / 262_142).to_string());
        }
        if !resources["pids"].is_null() {
            file("pids.max", resources["pids"]["limit"].to_string());
        }
        for page in list(&resources["hugepageLimits"]) {
            file(&format!("hugetlb.{}.max", text(&page["pageSize"])), page["limit"].to_string());
        }
        for (name, value) in entries(&resources["unified"]) {
            file(name, text(value));
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}

/// A capability's number (linux/capability.h); those that engines give.
fn number(name: &str) -> u32 {
    const NAMES: [&str; 32] = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
    ];
    let name = name.trim_start_matches("CAP_");
    NAMES.iter().position(|known| *known == name).map_or(63, |at| at as u32)
}
