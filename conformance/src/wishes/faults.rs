//! Each system call of a verb fails once, its own and those of the processes that it starts: it succeeds all the same, or
//! says why not, and `delete --force` takes away what is left.

mod calls;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::run::same;
use crate::cases::{At, Case, wish};
use crate::config::Config;
use crate::container::create_command;
use crate::leaks::Census;
use crate::process::{self, eventually, reap_orphans, wait_child};
use crate::tracer::{self, Point, Trace};
use crate::world::{World, remove_tree};

pub fn cases() -> Vec<Case> {
    vec![
        wish(At::Local, "faults/create-survives-or-tells-each", |world| all(world, &CREATE)),
        wish(At::Local, "faults/start-survives-or-tells-each", |world| all(world, &START)),
        wish(At::Local, "faults/exec-survives-or-tells-each", |world| all(world, &EXEC)),
        wish(At::Local, "faults/delete-survives-or-tells-each", |world| all(world, &DELETE)),
    ]
}

/// What is put to the test.
struct Verb {
    words: &'static [&'static str],
    script: &'static str,
    /// Brings the container to where the verb begins.
    prepare: fn(&Subject) -> Result<()>,
    /// The status of its success.
    good: i32,
    /// What must be so then.
    whole: fn(&Subject) -> Result<()>,
    /// What must be so where it has failed.
    failed: fn(&Subject) -> Result<()>,
    /// How many points are asked daily.
    daily: usize,
}

const CREATE: Verb = Verb {
    words: &["create", "--bundle", "BUNDLE", "--pid-file", "PIDFILE", "ID"],
    script: "exit 7",
    prepare: |_| Ok(()),
    good: 0,
    whole: |subject| {
        let started = subject.world.call(&["start", &subject.id])?;
        // Processes that go on beside the command may come to the point when it has just ended, and end of it.
        let is_others = subject.point.as_ref().is_some_and(|point| point.role != "0");
        // Its end may be on its way still.
        let is_stopped =
            || eventually("its end", Duration::from_secs(2), || Ok(subject.status()? == "stopped")).is_ok();
        if is_others && started.code == 1 && is_stopped() {
            return started.one_line(&[]).map(drop);
        }
        started.code(0)?.quiet()?;
        subject.ends_with(7)
    },
    failed: |subject| {
        ensure!(!subject.bundle.join("pid").exists(), "it failed, and the pid file is there");
        Ok(())
    },
    daily: 60,
};

const START: Verb = Verb {
    words: &["start", "ID"],
    script: "exit 7",
    prepare: |subject| subject.create(),
    good: 0,
    whole: |subject| subject.ends_with(7),
    failed: |_| Ok(()),
    daily: 15,
};

const EXEC: Verb = Verb {
    words: &["exec", "ID", "sh", "-c", "echo out; exit 3"],
    script: "trap 'exit 0' TERM; sleep 1000 & wait",
    prepare: |subject| subject.run(),
    good: 3,
    whole: |subject| {
        // What cannot be written is lost, as runtimes have it: some callers hand out descriptors that take nothing.
        let lost = subject.point.as_ref().is_some_and(|point| calls::name(point.call) == "write");
        ensure!(lost || subject.read("traced-out") == "out\n", "its output is lost");
        Ok(())
    },
    failed: |subject| {
        same(&subject.status()?, &"running".into())?;
        subject.world.call(&["exec", &subject.id, "sh", "-c", "exit 3"])?.code(3)?.quiet().map(drop)
    },
    daily: 15,
};

const DELETE: Verb = Verb {
    words: &["delete", "--force", "ID"],
    script: "sleep 1000 & exec sleep 1000",
    prepare: |subject| subject.run(),
    good: 0,
    whole: |subject| {
        subject.world.refused(&["state", &subject.id], &["does not exist"])?;
        subject.nothing_left()
    },
    failed: |_| Ok(()),
    daily: 15,
};

/// The longest that a verb may take: a guest has a minute to come up, ten seconds to greet and thirty to build a container.
const LIMIT: Duration = Duration::from_secs(110);

/// A container that a verb is tried on.
struct Subject<'a> {
    world: &'static World,
    before: &'a Census,
    point: Option<Point>,
    id: String,
    bundle: PathBuf,
}

impl<'a> Subject<'a> {
    fn new(world: &'static World, before: &'a Census, script: &str, point: Option<&Point>) -> Result<Self> {
        let hook = json!([{ "path": "/bin/true" }]);
        let config = Config::sh(script)
            .bind(world.shared_rootfs(), "/data", &["ro"])
            .set("/linux/maskedPaths", json!(["/proc/kcore"]))
            .set("/hooks/createRuntime", hook);
        Ok(Subject {
            world,
            before,
            point: point.cloned(),
            id: world.name("fault"),
            bundle: world.bundle(&config)?,
        })
    }

    fn create(&self) -> Result<()> {
        let mut create = create_command(self.world, &self.bundle, &self.id);
        create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(self.bundle.join("err"))?);
        let output = process::start(create, false, self.world.patience())?.finish()?;
        output.code(0).map(drop).with_context(|| self.read("err"))
    }

    fn run(&self) -> Result<()> {
        self.create()?;
        self.world.ok(&["start", &self.id]).map(drop)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.bundle.join(name)).unwrap_or_default()
    }

    fn status(&self) -> Result<String> {
        let output = self.world.ok(&["state", &self.id])?;
        let state: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(state["status"].as_str().unwrap_or_default().to_string())
    }

    /// Whether its process ends with this status, as its parent by adoption sees it.
    fn ends_with(&self, status: i32) -> Result<()> {
        let pid = self.read("pid").parse().context("the pid file")?;
        same(&wait_child(pid, Duration::from_secs(5))?, &status)
    }

    fn nothing_left(&self) -> Result<()> {
        reap_orphans();
        let left = self.before.left_over(self.world);
        if !left.is_empty() {
            self.before.clean_up(self.world);
            reap_orphans();
            bail!("left behind: {left:?}");
        }
        Ok(())
    }

    /// Runs the verb traced: its status, what it said, and its trace.
    fn traced(&self, verb: &Verb) -> Result<(i32, String, Trace)> {
        let place = |word: &&str| match *word {
            "ID" => self.id.clone(),
            "BUNDLE" => self.bundle.to_string_lossy().into_owned(),
            "PIDFILE" => self.bundle.join("pid").to_string_lossy().into_owned(),
            word => word.to_string(),
        };
        let args: Vec<String> = verb.words.iter().map(place).collect();
        let report = self.bundle.join("trace");
        let mut command = tracer::traced(&self.world.command(&args), self.point.as_ref(), &report)?;
        // Files: a container has its caller's streams, and would keep a pipe open.
        command
            .stdin(Stdio::null())
            .stdout(File::create(self.bundle.join("traced-out"))?)
            .stderr(File::create(self.bundle.join("traced-err"))?);
        let output = process::start(command, false, LIMIT * 2)?.finish()?;
        let said = self.read("traced-err");
        ensure!(output.code != i32::from(tracer::BROKEN), "the tracer: {said}");
        let trace = Trace::read(&report)?;
        ensure!(output.took < LIMIT, "it took {:.1?}; {}, {said:?}", output.took, output.code);
        Ok((output.code, said, trace))
    }
}

/// Tries a verb at one point. Whether it was reached.
fn attempt(world: &'static World, before: &Census, verb: &Verb, point: &Point) -> Result<Option<String>> {
    let subject = Subject::new(world, before, verb.script, Some(point))?;
    (verb.prepare)(&subject).context("set-up")?;
    let tried = subject.traced(verb);
    let judged = tried.and_then(|(code, said, trace)| {
        judge(verb, &subject, code, &said, &trace).with_context(|| {
            let name = trace.hit.as_deref().unwrap_or("not reached");
            format!("({name}) ended with {code}, {:?}", process::brief(&said))
        })?;
        Ok(trace.hit)
    });
    let deleted = world.ok(&["delete", "--force", &subject.id]).context("delete --force");
    // Its end first: it says what is left, and then sees to it that the next begins as this one did.
    let nothing_left = subject.nothing_left();
    remove_tree(&subject.bundle)?;
    let hit = judged?;
    deleted?;
    nothing_left.map(|()| hit)
}

fn judge(verb: &Verb, subject: &Subject, code: i32, said: &str, trace: &Trace) -> Result<()> {
    ensure!(!said.contains("panicked"), "a panic");
    for (role, status) in
        trace.ends.iter().map(|(role, status)| (role.as_str(), *status)).chain([("0", code)])
    {
        // 101: a panic. Signals: what bad code gets, not what processes send each other.
        ensure!(![101, 132, 133, 134, 135, 136, 139, 159].contains(&status), "{role} ended with {status}");
    }
    if code == verb.good {
        ensure!(said.is_empty(), "it succeeded, and complained");
        return (verb.whole)(subject);
    }
    ensure!(code != 0, "it said that it succeeded");
    // Where nothing can be written, not even that.
    let mute = |point: &Point| point.on && point.role == "0" && calls::name(point.call) == "write";
    if !subject.point.as_ref().is_some_and(mute) {
        same(&said.lines().count(), &1).context("lines that say why")?;
    }
    (verb.failed)(subject)
}

/// Every point that a verb passes.
fn points(trace: &Trace) -> Vec<Point> {
    let mut all = Vec::new();
    for ((role, call), count) in &trace.calls {
        let Some(errno) = calls::failure(*call) else { continue };
        let point = |nth, on| Point { role: role.clone(), call: *call, nth, errno, on };
        all.extend((1..=*count).map(|nth| point(nth, false)));
        // What fails because a disk is full or forbidden fails the next time too, as when the command tidies up.
        all.extend([1, *count / 2 + 1].map(|nth| point(nth, true)));
    }
    all
}

fn all(world: &'static World, verb: &Verb) -> Result<()> {
    let before = Census::take(world);
    let subject = Subject::new(world, &before, verb.script, None)?;
    (verb.prepare)(&subject)?;
    let (code, said, trace) = subject.traced(verb)?;
    ensure!(code == verb.good, "untouched, it ended with {code}: {said:?}");
    judge(verb, &subject, code, &said, &trace).context("untouched")?;
    world.ok(&["delete", "--force", &subject.id])?;
    subject.nothing_left()?;
    let every = points(&trace);
    let stride = if world.full { 1 } else { every.len().div_ceil(verb.daily) };
    let (begin, mut asked, mut reached, mut found) = (Instant::now(), 0, 0, Vec::new());
    for point in every.iter().skip(stride / 2).step_by(stride.max(1)) {
        asked += 1;
        match attempt(world, &before, verb, point) {
            Ok(hit) => reached += usize::from(hit.is_some()),
            Err(error) => {
                reached += 1;
                let shown = show(point);
                println!("# {} {shown}: {error:#}", verb.words[0]);
                found.push(format!("{shown}: {error:#}"));
            }
        }
    }
    let total = every.len();
    println!("# {asked} of {total} points, {reached} reached, {:.0?}", begin.elapsed());
    ensure!(
        found.is_empty(),
        "{} of {asked} points: {}",
        found.len(),
        found[..found.len().min(5)].join("; ")
    );
    // Processes that go on beside the command are not always as far when it ends.
    ensure!(reached * 10 >= asked * 8, "only {reached} of {asked} points were reached");
    Ok(())
}

fn show(point: &Point) -> String {
    let from = if point.on { " and on" } else { "" };
    format!("{} {}#{}{from} errno {}", point.role, calls::name(point.call), point.nth, point.errno)
}
