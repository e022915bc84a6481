//! Terminals, as those who sit at an engine's client have them.

use anyhow::{Result, ensure};

use super::engine::Engine;
use crate::process::Running;
use crate::pty::Terminal;

/// `run -it`, and beside it `exec -it`.
pub fn both(engine: &mut Engine) -> Result<()> {
    let name = engine.world.name("tty");
    let run = engine.making("run", &["--interactive", "--tty", "--name", &name], &["sh"]);
    let (mut terminal, client, _slave) = engine.on_terminal(&run, (31, 99))?;
    sit(&mut terminal, (31, 99))?;
    let exec = ["exec", "--interactive", "--tty", &name, "sh"];
    let (mut beside, exec, _its_slave) = engine.on_terminal(&exec, (40, 132))?;
    sit(&mut beside, (40, 132))?;
    leave(beside, exec, 6)?;
    leave(terminal, client, 5)?;
    engine.remove(&name)
}

/// Works at a shell whose terminal has this size, and is then made another.
pub fn sit(terminal: &mut Terminal, size: (u16, u16)) -> Result<()> {
    // Engines set the size once the program runs, and the shell's own line is echoed: the answers are spelt otherwise.
    // No line's end is looked for: `ctr` has the client's terminal add a carriage return of its own.
    let seen = |(rows, columns): (u16, u16)| {
        format!("until [ \"$(stty size)\" = '{rows} {columns}' ]; do sleep 0.1; done; echo si''ze {rows}\n")
    };
    for size in [size, (20, 70)] {
        terminal.say(&seen(size))?;
        terminal.expect_at_size(size, &format!("size {}\r", size.0))?;
    }
    // The job speaks itself: before it runs, a shell's child may still have the shell's ears for Control-C.
    terminal.say(
        "test -t 0 && test -t 1 && test -t 2 && echo a''ll; sh -c \"echo be''gun; exec sleep 1000\"\n",
    )?;
    let said = terminal.expect("begun\r")?;
    ensure!(said.contains("all\r"), "not every stream is the terminal: {said:?}");
    // Control-C ends the job, not the shell.
    terminal.say("\x03")?;
    terminal.say("echo st''ill $((6 * 7))\n")?;
    terminal.expect("still 42\r").map(drop)
}

/// Ends the shell, and with it the client, with this status.
pub fn leave(mut terminal: Terminal, client: Running, status: i32) -> Result<()> {
    terminal.say(&format!("exit {status}\n"))?;
    client.finish()?.code(status).map(drop)
}
