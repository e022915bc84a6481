//! Pods as Kubernetes has them: containerd's CRI plugin asked as the kubelet asks it, for the runtime under test and, for
//! what a pod is anywhere, for runc beside it.
//!
//! In: a node's configuration. Out: what the kubelet and kubectl's users see. Must not: know how the runtime is called.

mod containers;
mod host;
mod pod;
mod pods;
mod rpc;
mod schema;
mod stream;
mod surroundings;

use anyhow::Result;

use crate::cases::{At, Case, Check, Wish, group};
use crate::report::NotHere;
use crate::world::World;
use host::{BOX, Cri, RUNC};

pub fn cases() -> Vec<Case> {
    let all = [pods::WISHES, containers::WISHES, surroundings::WISHES].concat();
    let named = |(name, check): &OfPods| (*name, Box::new(*check) as Check<Cri>);
    let beside = |(name, check): &OfPods| {
        let name = format!("cri/{RUNC}/{}", name.trim_start_matches("cri/"));
        (&*name.leak(), Box::new(*check) as Check<Cri>)
    };
    let own = all.iter().chain(pods::OF_VMS).map(named).collect();
    let runc = all.iter().map(beside).collect();
    vec![group(At::Engines, |world| Cri::set_up(world, BOX), own), group(At::Engines, runc_beside, runc)]
}

/// What differs there is said at length alone: it takes minutes.
fn runc_beside(world: &'static World) -> Result<Cri> {
    if !world.full {
        return Err(NotHere("--full was not given").into());
    }
    Cri::set_up(world, RUNC)
}

/// A wish of this suite's.
type OfPods = Wish<Cri>;
