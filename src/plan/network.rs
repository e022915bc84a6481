//! What the annotations ask of the network.

use anyhow::{Result, bail};
use oci_spec::runtime::Spec;

/// The annotation about how the VM is connected.
pub const MODE: &str = "a3s.box/network-mode";
/// The annotation about how many NICs the VM has.
pub const NICS: &str = "a3s.box/nics";
/// NICs of a VM whose network namespace is new, so that its interfaces come later.
pub const DEFAULT_NICS: u8 = 2;
/// What the interrupts of a libkrun VM leave (it has 11, five other devices take one each).
pub const MOST_NICS: u8 = 6;

/// How a VM is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A NIC for each interface of its network namespace.
    Tap,
    /// The guest's IP sockets are made on the host, in its network namespace (libkrun's TSI).
    Tsi,
    /// Not at all.
    None,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// How to connect; the namespace decides where it is not said.
    pub mode: Option<Mode>,
    /// How many NICs.
    pub nics: Option<u8>,
}

/// Reads the annotations.
pub fn plan(spec: &Spec) -> Result<Wish> {
    let annotation = |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name));
    let mode = match annotation(MODE).map(String::as_str) {
        None => None,
        Some("tap") => Some(Mode::Tap),
        Some("tsi") => Some(Mode::Tsi),
        Some("none") => Some(Mode::None),
        Some(text) => bail!("annotation {MODE}: {text:?} is none of tap, tsi, none"),
    };
    let nics = match annotation(NICS).map(|text| (text, text.parse())) {
        None => None,
        Some((_, Ok(nics @ 0..=MOST_NICS))) => Some(nics),
        Some((text, _)) => bail!("annotation {NICS}: {text:?} is not a number from 0 to {MOST_NICS}"),
    };
    Ok(Wish { mode, nics })
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use serde_json::json;

    fn planned(name: &str, value: &str) -> Result<Wish> {
        plan(&spec(|v| v["annotations"] = json!({name: value})))
    }

    #[test]
    fn annotations_choose_mode_and_nics() {
        assert_eq!(plan(&spec(|_| ())).unwrap(), Wish::default());
        assert_eq!(planned(MODE, "tsi").unwrap().mode, Some(Mode::Tsi));
        assert_eq!(planned(NICS, "6").unwrap().nics, Some(6));
        for (name, value) in [(MODE, "bridge"), (MODE, ""), (NICS, "7"), (NICS, "-1"), (NICS, "many")] {
            let text = planned(name, value).unwrap_err().to_string();
            assert!(text.starts_with(&format!("annotation {name}: {value:?}")), "{text}");
        }
    }
}
