//! Tests, each named after a wish, and the loop that runs them.
//!
//! Wishes that can share a container are a group with one fixture, since a container may cost seconds. In: a list of
//! cases. Out: a report. Must not: let one failure, or one panic, keep the others from running.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow};

use crate::leaks::Census;
use crate::options::{Level, Options};
use crate::process::reap_orphans;
use crate::report::Report;
use crate::requirements;
use crate::world::World;

/// Levels at which a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Where containers are cheap.
    Local,
    /// Where they are VMs.
    Vm,
    /// At both.
    Both,
    /// At both, and in the smoke test.
    All,
    /// Where they are VMs on a host that systemd runs.
    Systemd,
    /// Where engines drive the runtime.
    Engines,
}

impl At {
    fn holds(self, level: Level) -> bool {
        match level {
            Level::Local => matches!(self, At::Local | At::Both | At::All),
            Level::Vm => matches!(self, At::Vm | At::Both | At::All),
            Level::Smoke => self == At::All,
            Level::Systemd => self == At::Systemd,
            Level::Engines => self == At::Engines,
            Level::Contract => matches!(self, At::Vm | At::Both | At::All | At::Systemd),
        }
    }
}

/// Runs those wishes of a case whose name is wanted.
type Run = Box<dyn Fn(&'static World, &dyn Fn(&str) -> bool, &mut Report)>;

/// Something to run: one wish or a group of them.
pub struct Case {
    at: At,
    /// Names of its wishes.
    pub names: Vec<&'static str>,
    run: Run,
}

/// A name and a check of what its group shares.
pub type Wish<F> = (&'static str, fn(&mut F) -> Result<()>);

/// The same for a closure.
pub type Check<F> = Box<dyn Fn(&mut F) -> Result<()>>;

/// One wish on its own.
pub fn wish(at: At, name: &'static str, check: fn(&'static World) -> Result<()>) -> Case {
    group(at, Ok, vec![(name, Box::new(move |world: &mut &'static World| check(world)))])
}

/// Wishes that share what `setup` makes.
pub fn sharing<F: 'static>(at: At, setup: fn(&'static World) -> Result<F>, wishes: &[Wish<F>]) -> Case {
    let boxed = wishes.iter().map(|(name, check)| (*name, Box::new(*check) as Check<F>));
    group(at, setup, boxed.collect())
}

/// The same with any closures. A wish that fails gets the next a new fixture.
pub fn group<F: 'static>(
    at: At,
    setup: fn(&'static World) -> Result<F>,
    wishes: Vec<(&'static str, Check<F>)>,
) -> Case {
    let names = wishes.iter().map(|(name, _)| *name).collect();
    let run = move |world: &'static World, wanted: &dyn Fn(&str) -> bool, report: &mut Report| {
        let mut fixture = None;
        for (name, check) in wishes.iter().filter(|(name, _)| wanted(name)) {
            if report.leave_out(name) {
                continue;
            }
            let begin = Instant::now();
            let result = guarded(|| {
                if fixture.is_none() {
                    fixture = Some(setup(world).map_err(|error| error.context("set-up"))?);
                }
                fixture.as_mut().map_or(Ok(()), check)
            });
            if result.is_err() {
                fixture = None;
            }
            report.report(name, &result, begin);
        }
    };
    Case { at, names, run: Box::new(run) }
}

fn guarded(check: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(check)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
        Err(anyhow!("the test panicked: {}", text.unwrap_or_default()))
    })
}

/// Names of the cases at a level.
pub fn names(cases: &[Case], level: Level) -> Vec<&'static str> {
    let all = cases.iter().filter(|case| case.at.holds(level)).flat_map(|case| case.names.iter().copied());
    all.filter(|name| belongs(name, level)).collect()
}

fn belongs(name: &str, level: Level) -> bool {
    level != Level::Contract || requirements::holds(name)
}

/// Whether no other suite that shares this directory has taken the case whose first wish this is. One that cannot ask
/// takes it: what runs twice does no harm.
fn claims(dir: &Path, first: &str) -> bool {
    let made = std::fs::create_dir(dir.join(first.replace('/', " ")));
    !made.is_err_and(|error| error.kind() == ErrorKind::AlreadyExists)
}

/// Runs what was asked for, and at last the leak check.
pub fn run(cases: &[Case], options: &Options, world: &'static World, report: &mut Report) {
    let level = world.level;
    let wanted = |name: &str| {
        let asked_for = |word: &String| name.contains(word.as_str());
        belongs(name, level) && (options.filters.is_empty() || options.filters.iter().any(asked_for))
    };
    // What is made once for all containers is no leak. Should even this fail, the tests will tell.
    let _ = world.run_config(&crate::config::Config::new(&["true"]));
    let before = Census::take(world);
    let mut left = Vec::new();
    for case in cases.iter().filter(|case| case.at.holds(level)) {
        let Some(first) = case.names.iter().find(|name| wanted(name)) else { continue };
        if options.share.as_deref().is_some_and(|dir| !claims(dir, first)) {
            continue;
        }
        let failed = report.counts().1;
        (case.run)(world, &wanted, report);
        reap_orphans();
        if report.counts().1 > failed {
            // What was killed because it hung could not clean up; that failure is told already.
            before.delete_all(world);
        }
        // Named here, while it is known who did it.
        let names = case.names.iter().filter(|name| wanted(name)).copied().collect::<Vec<_>>().join(", ");
        left.extend(before.left_over(world).into_iter().map(|thing| format!("{thing} (after {names})")));
        before.clean_up(world);
    }
    let begin = Instant::now();
    let shown: Vec<&str> = left.iter().take(10).map(String::as_str).collect();
    let result = match left.len() {
        0 => Ok(()),
        count => Err(anyhow!("{count} things are left behind: {}", shown.join("; "))),
    };
    report.report("leaks/nothing-is-left-behind", &result, begin);
}
