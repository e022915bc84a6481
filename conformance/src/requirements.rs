//! What is demanded of a runtime, and which wishes hold it to that: the part of the suite that is for any runtime.
//!
//! Two sources: runtime-spec 1.3, by its documents and sections, and what engines (containerd's shim, conmon, CRI-O,
//! podman, dockerd, BuildKit) do with a runtime, as P (processes and files) and C (commands). In and out: a table.
//! Must not: name a wish that knows one runtime's inside.

/// One demand.
#[derive(Debug)]
pub struct Requirement {
    /// Section of the spec, or number.
    pub id: &'static str,
    /// In a few words.
    pub demand: &'static str,
    /// What holds a runtime to it.
    pub wishes: &'static [&'static str],
}

const fn by(id: &'static str, demand: &'static str, wishes: &'static [&'static str]) -> Requirement {
    Requirement { id, demand, wishes }
}

/// Whether a wish belongs to any demand.
pub fn holds(name: &str) -> bool {
    of(name).is_some()
}

/// The first demand that a wish belongs to.
pub fn of(name: &str) -> Option<&'static str> {
    let has = |requirement: &&Requirement| requirement.wishes.contains(&name);
    REQUIREMENTS.iter().find(has).map(|requirement| requirement.id)
}

/// All of them.
pub const REQUIREMENTS: &[Requirement] = &[
    by(
        "P1",
        "the pid file is a bare number, and there only on success",
        &[
            "create/pid-file-holds-a-bare-number",
            "create/failure-leaves-no-pid-file",
            "pidfd/the-containers-goes-to-the-socket",
        ],
    ),
    by("P2", "the pid is adopted by the caller's subreaper", &["create/pid-is-its-callers-subreapers-child"]),
    by(
        "P3",
        "the pid ends with the process's status",
        &["kill/term-reaches-the-handler", "kill/kill-ends-it-with-137"],
    ),
    by(
        "P4",
        "so does the pid of exec --detach",
        &["detach/the-pid-is-adopted-and-ends-with-the-programs-status"],
    ),
    by(
        "P5",
        "nobody else keeps the caller's streams",
        &[
            "detach/nothing-of-the-callers-is-held-but-the-streams",
            "detach/streams-are-the-programs-to-their-end",
        ],
    ),
    by(
        "P6",
        "streams may be closed or read-only",
        &["streams/of-the-caller-may-be-closed", "streams/of-the-caller-may-be-read-only"],
    ),
    by(
        "P7",
        "the environment may be empty",
        &["environment/may-be-empty", "environment/an-empty-xdg-runtime-dir-is-none"],
    ),
    by(
        "P8",
        "any working directory will do",
        &["environment/a-deleted-working-directory", "create/a-relative-bundle"],
    ),
    by(
        "P9",
        "a killed create, start or exec leaves what delete --force cleans",
        &["chaos/create-killed-at-any-moment", "chaos/start-and-exec-killed-at-any-moment"],
    ),
    by(
        "P10",
        "session and process group are its own",
        &["create/own-session-and-group", "detach/session-group-and-cgroup-are-not-the-callers"],
    ),
    by(
        "P11",
        "SIGKILL of a detached exec's pid ends its process, others arrive",
        &["detach/sigkill-of-the-pid-ends-the-program", "detach/every-signal-reaches-the-program"],
    ),
    by(
        "P12",
        "SIGKILL of the pid ends everything, detached execs' pids too",
        &["pid/killed-ends-everything", "detach/ends-when-the-vm-does"],
    ),
    by(
        "P13",
        "the pid's namespaces are the container's",
        &["pid/every-namespace-can-be-opened-and-entered", "pid/a-network-namespace-given-by-path-is-joined"],
    ),
    by("P14", "the pid's root is the container's", &["mounts/the-pids-root-is-the-containers"]),
    by(
        "P15",
        "its cgroup is cgroupsPath",
        &["pid/its-cgroup-is-cgroups-path", "pid/what-runs-below-it-is-in-its-cgroup"],
    ),
    by(
        "P16",
        "an interface plugged in before start is usable",
        &["net/what-is-plugged-before-start-is-found"],
    ),
    by(
        "P17",
        "the root file system may be mounted at create alone",
        &["create/a-root-mounted-for-create-alone"],
    ),
    by("P18", "config.json is read once", &["create/config-json-is-read-once"]),
    by(
        "P19",
        "delete without --systemd-cgroup cleans the scope",
        &["systemd/delete-without-the-flag-takes-the-scope-along"],
    ),
    by(
        "C1",
        "state is one object with the known fields",
        &["state/one-object-with-the-fields-of-runc", "state/created-is-the-time-of-create"],
    ),
    by(
        "C2",
        "created, running, paused, stopped",
        &[
            "create/state-is-created-and-nothing-has-run",
            "start/state-is-running",
            "pause/state-is-paused-and-nothing-moves",
            "state/stopped-has-no-pid",
        ],
    ),
    by("C3", "ps --format json has the pids", &["pid/ps-as-json-holds-it"]),
    by(
        "C4",
        "features depends on nothing",
        &["features/json-that-depends-on-nothing", "features/no-property-that-the-spec-does-not-know"],
    ),
    by("C5", "--version in runc's form", &["version/in-runcs-form"]),
    by("C6", "an unknown id is named so", &["bad-input/an-unknown-id-for-every-verb"]),
    by(
        "C7",
        "kill in all forms",
        &[
            "kill/names-and-numbers-in-every-form",
            "kill/zero-only-asks",
            "kill/term-is-the-default",
            "kill/a-stopped-container-is-not-running",
        ],
    ),
    by(
        "C8",
        "delete in every state",
        &[
            "delete/a-running-container-is-refused-and-unharmed",
            "delete/a-created-container-is-ended",
            "delete/leaves-nothing",
        ],
    ),
    by(
        "C9",
        "a second create is refused and harmless",
        &["create/the-same-id-twice-is-refused-and-harmless", "create/twice-at-once-one-wins"],
    ),
    by(
        "C10",
        "a second start is refused",
        &[
            "start/a-second-start-is-refused",
            "start/a-stopped-container-is-refused",
            "start/twice-at-once-one-wins",
        ],
    ),
    by(
        "C11",
        "what cannot be executed is told by create",
        &["create/failure-leaves-no-pid-file", "exec/a-missing-program-is-an-error-in-runcs-words"],
    ),
    by(
        "C12",
        "exec in the foreground",
        &[
            "exec/output-errors-and-status-are-the-programs",
            "exec/stdin-reaches-the-program-to-its-end",
            "exec/signals-are-forwarded",
            "terminal/a-process-file-may-want-the-callers-own",
            "terminal/execs-own-is-raw-and-as-before-in-the-end",
        ],
    ),
    by(
        "C13",
        "exec refused: 255, no pid file",
        &[
            "exec/a-stopped-container-is-refused",
            "pause/exec-is-refused",
            "detach/paused-stopped-and-unknown-are-refused-without-a-pid-file",
        ],
    ),
    by("C14", "the terminal's master is sent before create ends", &["terminal/of-the-container-itself"]),
    by(
        "C15",
        "all output arrives, ignored input blocks nobody",
        &["streams/a-created-containers-own-pipes-carry-everything"],
    ),
    by(
        "C16",
        "update takes resources in every form",
        &["update/takes-resources-in-every-form", "update/memory-may-grow"],
    ),
    by(
        "C17",
        "a paused container",
        &[
            "pause/kill-works-on-a-paused-container",
            "pause/delete-by-force-works-on-a-paused-container",
            "resume/it-goes-on-where-it-was",
        ],
    ),
    by(
        "C18",
        "one record of a failure in the log, none of a success",
        &[
            "log/a-failure-is-one-json-line",
            "log/success-leaves-an-empty-file",
            "log/failed-exec-is-logged-too",
        ],
    ),
    by(
        "C19",
        "hooks, and what follows when one fails",
        &[
            "hooks/a-failing-prestart-hook-fails-create",
            "hooks/a-failing-create-container-hook-fails-create",
            "hooks/a-timeout-is-kept",
        ],
    ),
    by("C20", "checkpoint and restore say no", &["checkpoint/and-restore-are-refused-at-once"]),
    by(
        "C21",
        "many at once, and kill during create",
        &[
            "many/containers-at-once-live-and-go",
            "many/programs-at-once-keep-their-streams-and-statuses",
            "chaos/create-killed-at-any-moment",
        ],
    ),
    by("C22", "every ociVersion 1.x, unknown fields", &["create/any-version-1-and-unknown-fields"]),
    by(
        "C23",
        "run in the foreground",
        &[
            "run/exit-status-is-the-workloads",
            "run/keep-keeps-a-stopped-container",
            "run/state-shows-it-running",
        ],
    ),
    by("C24", "list passes over what is foreign", &["list/as-json", "list/what-is-not-ours-is-passed-over"]),
    by(
        "C25",
        "every flag of engines is taken",
        &[
            "flags/every-global-one-in-every-form",
            "flags/creates-and-runs-in-every-form",
            "create/preserved-descriptors-reach-the-process",
            "create/a-pidfd-is-sent-to-its-socket",
        ],
    ),
    by(
        "runtime.md Start",
        "MUST fail where it is not created",
        &["start/a-second-start-is-refused", "start/a-stopped-container-is-refused"],
    ),
    by(
        "runtime.md Kill",
        "MUST fail where it is neither created nor running",
        &["kill/a-stopped-container-is-not-running", "kill/in-each-state"],
    ),
    by(
        "runtime.md Delete",
        "MUST fail where it is not stopped",
        &["delete/a-running-container-is-refused-and-unharmed"],
    ),
    by(
        "runtime.md Lifecycle",
        "hooks in order; a failing one stops the container",
        &[
            "hooks/create-runs-its-three-kinds-in-order",
            "hooks/start-runs-start-container-before-the-process-and-poststart-after-it",
            "hooks/delete-runs-poststop-when-nothing-is-left",
            "hooks/a-failing-start-container-hook-fails-start",
            "hooks/a-failing-poststart-hook-ends-the-container",
        ],
    ),
    by(
        "runtime.md State",
        "annotations and status, also for hooks",
        &["hooks/those-of-create-get-the-state-creating", "hooks/poststart-gets-the-state-running"],
    ),
    by(
        "config.md Hooks",
        "namespaces, arguments, environment",
        &[
            "hooks/prestart-and-create-runtime-run-in-the-runtimes-namespaces",
            "hooks/create-container-runs-in-the-containers-namespaces",
            "hooks/create-container-sees-the-mounts-below-the-root",
            "hooks/arguments-and-environment-are-those-given",
            "hooks/start-container-runs-in-the-container-with-its-processs-environment",
        ],
    ),
    by("config.md Root", "readonly", &["mounts/a-read-only-root-cannot-be-changed"]),
    by(
        "config.md Mounts",
        "in order, with their options",
        &[
            "mounts/order-is-that-of-config-json",
            "mounts/each-file-system-is-there-with-its-options",
            "mounts/a-read-only-bind-cannot-be-changed",
            "mounts/a-single-file-is-bound",
            "mounts/a-bound-fifo-reaches-the-host",
        ],
    ),
    by(
        "config.md Process",
        "user, environment, cwd, capabilities, limits",
        &[
            "process/user-groups-and-umask-are-as-asked",
            "process/environment-is-as-asked-plus-home",
            "process/capabilities-are-as-asked",
            "process/every-capability-set-is-its-own",
            "process/rlimits-are-as-asked",
            "process/no-new-privileges-is-as-asked",
            "process/oom-score-is-as-asked",
            "process/scheduling-is-as-asked",
        ],
    ),
    by("config.md Hostname", "host and domain name", &["process/hostname-and-domainname-are-as-asked"]),
    by(
        "config-linux.md Default Filesystems",
        "the file systems that programs expect",
        &["mounts/each-file-system-is-there-with-its-options"],
    ),
    by(
        "config-linux.md Default Devices",
        "the devices that programs expect",
        &["mounts/devices-and-links-every-program-expects"],
    ),
    by(
        "config-linux.md Namespaces",
        "new ones and given ones",
        &[
            "pid/namespaces-are-its-own",
            "process/the-first-is-pid-1-of-its-namespace",
            "pid/a-network-namespace-given-by-path-is-joined",
            "namespaces/pid-given-by-path-is-joined",
        ],
    ),
    by(
        "config-linux.md Masked and Readonly Paths",
        "hidden, or not to be changed",
        &["mounts/masked-paths-are-empty", "mounts/readonly-paths-cannot-be-changed"],
    ),
    by(
        "config-linux.md Devices",
        "made with their numbers, mode and owner",
        &["devices/are-made-with-numbers-owner-and-mode", "devices/of-the-host-are-made"],
    ),
    by(
        "config-linux.md Control groups",
        "limits hold, devices that no rule allows stay shut",
        &["resources/every-limit-becomes-the-guests", "devices/one-that-no-rule-allows-cannot-be-opened"],
    ),
    by(
        "config-linux.md Sysctl",
        "parameters of its namespaces",
        &["sysctl/parameters-hold-in-the-container"],
    ),
    by(
        "config-linux.md Offset for Time Namespace",
        "clocks are shifted",
        &["time/offsets-hold-for-the-first-process-and-for-others"],
    ),
    by(
        "config-linux.md Personality",
        "the execution domain",
        &["personality/linux32-is-what-all-processes-have"],
    ),
    by(
        "config-linux.md Seccomp",
        "actions, errno, arguments; what engines load bites; a listener",
        &[
            "seccomp/both-the-first-process-and-exec-are-filtered",
            "seccomp/errno-is-the-one-given",
            "seccomp/errno-is-eperm-where-none-is-given",
            "seccomp/kill-process-ends-it-by-sigsys",
            "seccomp/arguments-equal-less-and-greater",
            "seccomp/arguments-under-a-mask",
            "seccomp/dockers-default-profile-bites",
            "seccomp/podmans-default-profile-bites",
            "seccomp/notify-hands-the-listener-over",
        ],
    ),
    by(
        "config-linux.md Rootfs Mount Propagation",
        "inside, and out of it",
        &["mounts/root-propagation-may-be-shared", "mounts/a-shared-bind-brings-mounts-back-to-the-host"],
    ),
    by("config-vm.md", "a kernel and a size", &["vm/kernel-parameters-and-sizes-are-as-asked"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_there_and_every_wish_exists() {
        let cases = crate::wishes::all();
        let names: Vec<_> = cases.iter().flat_map(|case| case.names.iter().copied()).collect();
        for requirement in REQUIREMENTS {
            assert!(!requirement.wishes.is_empty(), "{}", requirement.id);
            for wish in requirement.wishes {
                assert!(names.contains(wish), "{}: {wish}", requirement.id);
            }
        }
        let numbers = (1..=19).map(|n| format!("P{n}")).chain((1..=25).map(|n| format!("C{n}")));
        for id in numbers {
            assert_eq!(REQUIREMENTS.iter().filter(|requirement| requirement.id == id).count(), 1, "{id}");
        }
    }
}
