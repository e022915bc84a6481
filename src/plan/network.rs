//! What annotations and configuration ask of the network.

use super::settings::Settings;

/// The annotation about how the VM is connected.
pub const MODE: &str = "a3s.box/network-mode";
/// The annotation about how many NICs the VM has.
pub const NICS: &str = "a3s.box/nics";
/// NICs of a VM whose network namespace is new, so that its interfaces come later.
pub const DEFAULT_NICS: u8 = 2;
/// What the interrupts of a libkrun VM leave (it has 11, five other devices take one each).
pub const MOST_NICS: u8 = 6;

/// How a VM is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As its network namespace suggests: by TSI in the host's, else by taps.
    #[default]
    Auto,
    /// A NIC for each interface of its network namespace.
    Tap,
    /// The guest's IP sockets are made on the host, in its network namespace (libkrun's TSI).
    Tsi,
    /// Not at all.
    None,
}

impl Mode {
    const ALL: [Mode; 4] = [Mode::Auto, Mode::Tap, Mode::Tsi, Mode::None];

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Tap => "tap",
            Mode::Tsi => "tsi",
            Mode::None => "none",
        }
    }

    /// The mode with this word.
    pub fn of(word: &str) -> Option<Self> {
        Mode::ALL.into_iter().find(|mode| mode.word() == word)
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// How to connect.
    pub mode: Mode,
    /// How many NICs, where the container says.
    pub nics: Option<u8>,
    /// How many, where nothing tells.
    pub spare: u8,
}

/// Annotations win over the host's configuration.
pub fn plan(asked: &Settings, host: &Settings) -> Wish {
    Wish {
        mode: asked.network_mode.or(host.network_mode).unwrap_or_default(),
        nics: asked.nics,
        spare: host.nics.unwrap_or(DEFAULT_NICS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_wins_over_the_host() {
        let asked = Settings { network_mode: Some(Mode::None), nics: Some(0), ..Settings::default() };
        let host = Settings { network_mode: Some(Mode::Tap), nics: Some(4), ..Settings::default() };
        let none = Settings::default();
        assert_eq!(plan(&asked, &host), Wish { mode: Mode::None, nics: Some(0), spare: 4 });
        assert_eq!(plan(&none, &host), Wish { mode: Mode::Tap, nics: None, spare: 4 });
        assert_eq!(plan(&none, &none), Wish { mode: Mode::Auto, nics: None, spare: DEFAULT_NICS });
    }
}
