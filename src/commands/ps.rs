//! `ps`: for programs the host's pids, for people the guest's processes.

use a3s_box_proto::{Outcome, Request};
use anyhow::{Context as _, Result, bail};

use super::{Context, list, start};
use crate::cli::{self, Format};
use crate::guest;
use crate::store::Status;

/// The verb.
pub fn ps(context: &Context, args: &cli::Ps) -> Result<i32> {
    let record = context.store.read(&args.id)?;
    let text = match args.format {
        Format::Json => {
            let mut pids = record.cgroup.pids();
            if pids.is_empty() && record.live_pid() != 0 {
                pids.push(record.live_pid());
            }
            format!("{}\n", serde_json::to_string(&pids).context("encode pids")?)
        }
        Format::Table => {
            match record.status() {
                Status::Created | Status::Running => {}
                Status::Paused => bail!("container is paused: its guest cannot answer"),
                Status::Creating | Status::Stopped => bail!("container not running"),
            }
            let mut connection = start::connect(&context.store.path(&args.id)?, &record, guest::GREETING)?;
            match connection.call(&Request::Processes { container: record.id.clone() }, guest::ANSWER)? {
                Outcome::Processes(processes) => table(&processes),
                other => bail!("the guest did not list the processes: {other:?}"),
            }
        }
    };
    super::write_out(&text)?;
    Ok(0)
}

fn table(processes: &[a3s_box_proto::ProcessInfo]) -> String {
    let mut rows = vec![["UID", "PID", "PPID", "CMD"].map(String::from)];
    rows.extend(processes.iter().map(|process| {
        let command = guest::clean(&process.command);
        [process.uid.to_string(), process.pid.to_string(), process.ppid.to_string(), command]
    }));
    list::columns(&rows)
}
