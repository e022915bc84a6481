//! Any config.json: no panic; and what can be planned stays within its bounds and survives the wire.
#![no_main]

use std::path::{Component, Path};

use a3s_box_fuzz::cli::CgroupManager;
use a3s_box_fuzz::plan::cgroup::{Place, place};
use a3s_box_fuzz::{bundle, plan};
use a3s_box_proto::{Frame, Request, pack, unpack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok((spec, machine, _)) = bundle::parse(text, Path::new("config.json"), &[]) else { return };
    let host = plan::Settings::default();
    let planned = plan::plan("id", &spec, &machine, &host, Path::new("/bundle/rootfs"), Path::new("/bundle"));
    let Ok(plan) = planned else { return };
    assert!((1..=plan::vm::MAX_VCPUS).contains(&plan.vm.vcpus));
    assert!(plan.vm.memory_mib >= plan::vm::MIN_MEMORY_MIB);
    let given = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    for manager in [CgroupManager::Cgroupfs, CgroupManager::Systemd] {
        match place("id", given, manager, true) {
            Ok(Some(Place::Path(path))) => {
                assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{path:?}")
            }
            Ok(Some(Place::Scope(scope))) => {
                assert!(!scope.slice.contains('/') && !scope.unit.contains('/'), "{scope:?}")
            }
            Ok(None) | Err(_) => {}
        }
    }
    assert!(!plan.guest.process.args.is_empty() && plan.guest.process.cwd.is_absolute());
    let request = Request::Create(Box::new(plan.guest));
    if let Ok(Frame::Message(body)) = pack(&request) {
        assert_eq!(unpack::<Request>(&body).as_ref(), Ok(&request));
    }
});
