//! Builds guest-init as a static binary, to be embedded: one `cargo build` yields one file.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=guest-init");
    println!("cargo:rerun-if-changed=Cargo.lock");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = env::var("TARGET")?;
    let local = env::var_os("CARGO_FEATURE_LOCAL_GUEST").is_some();
    // A target directory of its own: this build runs inside one that holds the lock of the outer. OUT_DIR is
    // TARGET-DIR/PROFILE/build/PACKAGE/out: beside the profiles lies what they all embed.
    let target_dir = out.ancestors().nth(4).ok_or("OUT_DIR is no directory of cargo's")?.join("guest");
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .args([
            "build",
            "--package",
            "guest-init",
            "--release",
            "--locked",
            "--target",
            &target,
            "--target-dir",
        ])
        .arg(&target_dir)
        .env_remove("RUSTFLAGS")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            ["-Ctarget-feature=+crt-static", "-Crelocation-model=static"].join("\u{1f}"),
        )
        // The linter of the outer build has nothing to say about the inner one.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        // It crosses into the guest page by page: small is fast.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat");
    if local {
        cargo.args(["--features", "local"]);
    }
    if !cargo.status()?.success() {
        return Err("guest-init does not build".into());
    }
    fs::copy(target_dir.join(target).join("release/guest-init"), out.join("guest-init"))?;
    println!("cargo:rustc-env=A3S_BOX_COMMIT={}", commit());
    Ok(())
}

/// The commit that is built, for `--version`; a release tarball has none.
fn commit() -> String {
    // Unlike HEAD it changes with every commit.
    println!("cargo:rerun-if-changed=.git/logs/HEAD");
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_string(),
        _ => "unknown".into(),
    }
}
