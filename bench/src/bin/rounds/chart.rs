//! The figures as bars: a group for each thing measured, a bar for each of whom, the longest of a group the full width.

use std::fmt::Write;

use crate::Step;

const WIDTH: f64 = 720.0;
const LABELS: f64 = 150.0;
/// Room for the figure behind the longest bar.
const FIGURES: f64 = 120.0;
const BAR: f64 = 14.0;
const ROW: f64 = 20.0;
const HEAD: f64 = 34.0;

const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#24292f}.what{font-weight:600}.bar{fill:#8c959f}\
    .own{fill:#0969da}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bar{fill:#6e7681}.own{fill:#4493f8}}";

/// An SVG picture, readable on light and dark ground. Things that only one has are left out: there is nothing to compare.
pub fn svg(steps: &[Step]) -> String {
    let (mut body, mut y) = (String::new(), 0.0);
    for group in steps.chunk_by(|one, next| one.what == next.what) {
        if let [first, _, ..] = group {
            draw(&mut body, &mut y, first, group);
        }
    }
    let height = y + HEAD / 2.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"Benchmarks\"><style>{STYLE}</style>\n{body}</svg>\n"
    )
}

fn draw(body: &mut String, y: &mut f64, first: &Step, group: &[Step]) {
    let longest = group.iter().map(Step::median).fold(0.0, f64::max);
    let (what, unit) = (escaped(&first.what), first.unit());
    let better = if first.is_rate() { "more" } else { "less" };
    *y += HEAD;
    // Writing to a string cannot fail.
    let head = *y - 8.0;
    let _ = writeln!(
        body,
        "<text class=\"what\" x=\"0\" y=\"{head:.0}\">{what} ({unit}; {better} is better)</text>"
    );
    for step in group {
        let length = (step.median() / longest * (WIDTH - LABELS - FIGURES)).max(1.0);
        let class = if step.who == "a3s-box" { "own" } else { "bar" };
        let (who, text) = (escaped(&step.who), *y + BAR - 2.0);
        let _ = writeln!(
            body,
            "<text x=\"0\" y=\"{text:.0}\">{who}</text><rect class=\"{class}\" x=\"{LABELS}\" y=\"{y:.0}\" \
             width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\"/><text x=\"{:.1}\" y=\"{text:.0}\">{}</text>",
            LABELS + length + 6.0,
            short(step.median()),
        );
        *y += ROW;
    }
}

/// Three digits tell enough.
fn short(figure: f64) -> String {
    if figure < 10.0 {
        format!("{figure:.2}")
    } else if figure < 100.0 {
        format!("{figure:.1}")
    } else {
        format!("{figure:.0}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::steps;

    #[test]
    fn bars_are_as_long_as_their_medians() {
        let steps = steps(&[("run: floor", &[50.0]), ("run: a3s-box", &[100.0]), ("alone", &[1.0])]);
        let picture = svg(&steps);
        assert!(picture.contains("class=\"bar\" x=\"150\" y=\"34\" width=\"225.0\""), "{picture}");
        assert!(picture.contains("class=\"own\" x=\"150\" y=\"54\" width=\"450.0\""), "{picture}");
        assert!(!picture.contains("alone"), "{picture}");
    }
}
