//! AppArmor's profiles, as engines load them.
//!
//! In: a name. Out: a profile of docker's kind that the kernel knows by it. Must not: leave one loaded.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::world::World;

/// What moby writes (profiles/apparmor/template.go), as far as it says what may be done.
const RULES: &str = "flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  deny /proc/* w,
  deny /proc/sys/[^k]** w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny mount,
  deny /sys/[^f]*/** wklx,
  deny /sys/firmware/** rwklx,
}
";

/// Whether this host's kernel has it, switched on.
pub fn is_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
}

/// A loaded profile. Dropped, it is gone.
pub struct Profile {
    world: &'static World,
    text: String,
}

impl Profile {
    /// Loads it.
    pub fn load(world: &'static World, name: &str) -> Result<Self> {
        let profile = Profile { world, text: format!("profile {name} {RULES}") };
        profile.parse("--replace")?;
        Ok(profile)
    }

    fn parse(&self, act: &str) -> Result<()> {
        let mut command = Command::new("apparmor_parser");
        command.args([act, "--skip-cache", "--quiet"]);
        process::run(command, self.text.as_bytes(), self.world.patience())?.code(0).map(drop)
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = self.parse("--remove");
    }
}
