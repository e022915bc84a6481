//! `timeline`: where a container's start went, drawn.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::Context;
use crate::cli::{self, TimelineFormat};
use crate::timeline::{self, Side, Span};

/// Characters of the longest bar.
const COLUMNS: u64 = 48;

/// The verb.
pub fn timeline(context: &Context, args: &cli::Timeline) -> Result<i32> {
    context.store.read(&args.id)?;
    let spans = timeline::read(&context.store.path(&args.id)?)?;
    let text = match args.format {
        TimelineFormat::Text => text(&args.id, &spans),
        TimelineFormat::Svg => svg(&args.id, &spans),
        TimelineFormat::Trace => trace(&spans)?,
    };
    super::write_out(&text)?;
    Ok(0)
}

/// A span with its place on an axis from which the caller's time is cut out.
struct Bar<'a> {
    span: &'a Span,
    from: u64,
    to: u64,
}

fn bars(spans: &[Span]) -> (Vec<Bar<'_>>, u64) {
    let (mut bars, mut at) = (Vec::new(), 0);
    for span in spans {
        let from = at;
        at += if span.mark.side() == Side::Caller { 0 } else { span.to - span.from };
        bars.push(Bar { span, from, to: at });
    }
    (bars, at.max(1))
}

fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

fn title(id: &str, total: u64) -> String {
    format!("{id}: {:.1} ms, the caller's time left out", milliseconds(total))
}

fn text(id: &str, spans: &[Span]) -> String {
    let (bars, total) = bars(spans);
    let mut text = format!("{}\n\n", title(id, total));
    for Bar { span, from, to } in bars {
        let column = |at: u64| (at * COLUMNS / total) as usize;
        let bar = match span.mark.side() {
            Side::Caller => "·".into(),
            side => (if side == Side::Guest { "▓" } else { "█" }).repeat((column(to) - column(from)).max(1)),
        };
        let time = milliseconds(span.to - span.from);
        let _ = writeln!(text, "{:20}{time:10.1} ms  {}{bar}", span.mark.what(), " ".repeat(column(from)));
    }
    text.push_str("\n█ host  ▓ guest\n");
    text
}

fn svg(id: &str, spans: &[Span]) -> String {
    const ROW: usize = 26;
    const WIDTH: u64 = 520;
    let (bars, total) = bars(spans);
    let height = 64 + ROW * bars.len();
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <style>rect {{ fill: #0969da }} .guest {{ fill: #1a7f37 }} text {{ fill: #1f2328 }} \
         @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} rect {{ fill: #58a6ff }} .guest {{ fill: #3fb950 }} }}</style>\n\
         <text x=\"16\" y=\"26\" font-weight=\"600\">{}</text>\n",
        title(id, total)
    );
    for (row, Bar { span, from, to }) in bars.into_iter().enumerate() {
        let y = 46 + ROW * row;
        let (x, width) = (160 + from * WIDTH / total, ((to - from) * WIDTH / total).max(1));
        let class = if span.mark.side() == Side::Guest { " class=\"guest\"" } else { "" };
        let _ = write!(text, "<text x=\"16\" y=\"{}\">{}</text>", y + 14, span.mark.what());
        if span.mark.side() != Side::Caller {
            let _ =
                write!(text, "<rect{class} x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"18\" rx=\"2\"/>");
        }
        let (time, after) = (milliseconds(span.to - span.from), x + width + 6);
        let _ = writeln!(text, "<text x=\"{after}\" y=\"{}\">{time:.1} ms</text>", y + 14);
    }
    text.push_str("</svg>\n");
    text
}

/// Chrome's trace event format, complete events, for chrome://tracing and Perfetto.
fn trace(spans: &[Span]) -> Result<String> {
    let events: Vec<_> = spans
        .iter()
        .map(|span| {
            let category = format!("{:?}", span.mark.side()).to_lowercase();
            json!({
                "name": span.mark.what(), "cat": category, "ph": "X", "pid": 1, "tid": span.mark.side() as u8,
                "ts": span.from, "dur": span.to - span.from,
            })
        })
        .collect();
    let text = serde_json::to_string(&json!({ "displayTimeUnit": "ms", "traceEvents": events }));
    Ok(format!("{}\n", text.context("encode the trace")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::Mark;

    fn spans() -> Vec<Span> {
        vec![
            Span { mark: Mark::Planned, from: 0, to: 1000 },
            Span { mark: Mark::Listening, from: 1000, to: 3000 },
            Span { mark: Mark::Start, from: 3000, to: 90_000_000 },
            Span { mark: Mark::Started, from: 90_000_000, to: 90_001_000 },
        ]
    }

    #[test]
    fn bars_leave_out_the_callers_time() {
        let text = text("web", &spans());
        assert!(text.starts_with("web: 4.0 ms"), "{text}");
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_string();
        assert!(line("plan").ends_with(&"█".repeat(12)), "{text}");
        assert!(line("guest kernel").ends_with(&format!("{}{}", " ".repeat(12), "▓".repeat(24))), "{text}");
        assert!(line("waiting for start").contains("89997.0 ms") && line("waiting").ends_with('·'), "{text}");
    }

    #[test]
    fn a_trace_has_an_event_a_span() {
        let trace: serde_json::Value = serde_json::from_str(&trace(&spans()).unwrap()).unwrap();
        assert_eq!(trace["traceEvents"][1]["dur"], 2000);
        assert_eq!(trace["traceEvents"].as_array().unwrap().len(), 4);
        assert_eq!(svg("web", &spans()).matches("<rect").count(), 3);
    }
}
