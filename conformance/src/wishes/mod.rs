//! The wishes, one file a subject.

mod bad_configs;
mod bad_input;
mod bench;
mod calling;
mod chaos;
mod contract;
mod death;
mod detach;
mod engines;
mod environment;
mod examples;
mod exec;
#[cfg(target_arch = "x86_64")]
mod faults;
mod fields;
mod hooks;
mod hostile;
mod hostile_rootfs;
mod identity;
mod jail;
mod kill;
mod lan;
mod lifecycle;
mod listing;
mod machine;
mod many;
mod memory;
pub mod mount_options;
mod mount_order;
mod mounts;
mod network;
mod network_faults;
mod not_everywhere;
mod oom;
mod own_kernel;
mod pause;
mod pidfd;
mod pods;
pub mod pods_without_sandbox;
mod resources;
mod run;
mod seccomp;
mod settings;
mod soak;
mod sockets;
mod states;
mod streams;
mod systemd;
mod terminal;
mod update;
mod users;

use crate::cases::{At, Case, sharing};

pub use run::same;

/// Every test, in the order they run.
pub fn all() -> Vec<Case> {
    let shared = [
        exec::SHARED,
        detach::SHARED,
        pidfd::SHARED,
        terminal::SHARED,
        streams::SHARED,
        environment::SHARED,
        mounts::SHARED,
    ]
    .concat();
    let mut cases = vec![sharing(At::Both, bench::Bench::set_up, &shared)];
    cases.extend(
        [
            run::cases(),
            lifecycle::cases(),
            states::cases(),
            hooks::cases(),
            contract::cases(),
            exec::cases(),
            detach::cases(),
            pidfd::cases(),
            terminal::cases(),
            streams::cases(),
            environment::cases(),
            mounts::cases(),
            sockets::cases(),
            mount_options::cases(),
            mount_order::cases(),
            kill::cases(),
            pause::cases(),
            pods::cases(),
            pods_without_sandbox::cases(),
            death::cases(),
            identity::cases(),
            network::cases(),
            network_faults::cases(),
            resources::cases(),
            oom::cases(),
            memory::cases(),
            seccomp::cases(),
            settings::cases(),
            systemd::cases(),
            fields::cases(),
            own_kernel::cases(),
            not_everywhere::cases(),
            engines::cases(),
            examples::cases(),
            update::cases(),
            listing::cases(),
            bad_input::cases(),
            calling::cases(),
            hostile::cases(),
            jail::cases(),
            hostile_rootfs::cases(),
            users::cases(),
            machine::cases(),
            many::cases(),
            chaos::cases(),
            soak::cases(),
            #[cfg(target_arch = "x86_64")]
            faults::cases(),
        ]
        .into_iter()
        .flatten(),
    );
    cases
}
