//! `list`: every container below the root.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Context, state};
use crate::cli::{self, Format};
use crate::console;
use crate::pod;
use crate::store::Record;

/// The verb.
pub fn list(context: &Context, args: &cli::List) -> Result<i32> {
    if let Some(root) = &context.root {
        // One that is not there yet has no containers only where nobody names it.
        std::fs::metadata(root).with_context(|| format!("open {}", root.display()))?;
    }
    let records = context.store.list()?;
    let text = match (args.quiet, args.format) {
        (true, _) => records.iter().map(|record| format!("{}\n", record.id)).collect(),
        (false, Format::Table) => table(&records),
        (false, Format::Json) if records.is_empty() => "null\n".into(),
        (false, Format::Json) => {
            let documents: Vec<_> = records.iter().map(|record| document(context, record)).collect();
            format!("{}\n", serde_json::to_string(&documents).context("encode list")?)
        }
    };
    super::write_out(&text)?;
    Ok(0)
}

/// What `state` prints, and where the guest's console log is: there engines would take that for a field of their own.
fn document(context: &Context, record: &Record) -> Value {
    let mut document = state::document(record);
    let path = context.store.path(&record.id).map(|dir| pod::vm_dir(&dir, record).join(console::LOG));
    if let (Ok(path), Some(fields)) = (path, document.as_object_mut())
        && path.exists()
    {
        fields.insert("console-log".into(), json!(path));
    }
    document
}

fn table(records: &[Record]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from)];
    rows.extend(records.iter().map(|record| {
        [
            record.id.clone(),
            record.live_pid().to_string(),
            record.status().to_string(),
            record.bundle.display().to_string(),
            record.created.clone(),
            state::owner(record.owner),
        ]
    }));
    columns(&rows)
}

/// Pads columns as runc's tabwriter does: at least 12 wide, 3 apart.
pub fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count() + 3).max().unwrap_or(0).max(12);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["ID".into(), "X".into()], ["a-longer-container-id".into(), "y".into()]];
        assert_eq!(columns(&rows), "ID                      X\na-longer-container-id   y\n");
    }
}
