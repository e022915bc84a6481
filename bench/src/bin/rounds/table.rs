//! The figures as a table for people and as JSON.

use serde_json::json;

use crate::Step;

/// A markdown table, a row for each step.
pub fn markdown(steps: &[Step]) -> String {
    let mut text = String::from("| | | median | best | unit | ratio | to |\n|---|---|--:|--:|---|--:|---|\n");
    for step in steps {
        let (ratio, to) = ratio(steps, step);
        let (what, who, unit) = (&step.what, &step.who, step.unit());
        let row = format!(
            "| {what} | {who} | {:.1} | {:.1} | {unit} | {ratio:.2} | {to} |\n",
            step.median(),
            step.best()
        );
        text.push_str(&row);
    }
    text
}

/// An array with an object for each step.
pub fn json(steps: &[Step]) -> String {
    let object = |step: &Step| {
        let (ratio, to) = ratio(steps, step);
        json!({
            "what": step.what, "who": step.who, "unit": step.unit(), "median": step.median(), "best": step.best(),
            "ratio": ratio, "to": to, "figures": step.figures,
        })
    };
    format!("{:#}\n", serde_json::Value::Array(steps.iter().map(object).collect()))
}

/// The median as a multiple of that of the step it is held against, and that one's label.
fn ratio(steps: &[Step], step: &Step) -> (f64, String) {
    let base = match &step.against {
        Some(label) => steps.iter().find(|other| other.label() == *label),
        None => steps.iter().find(|other| other.what == step.what),
    };
    base.map_or((f64::NAN, String::new()), |base| (step.median() / base.median(), base.label()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::steps;

    #[test]
    fn a_row_is_held_against_the_first_of_its_kind_or_another() {
        let steps = steps(&[("run: floor", &[100.0]), ("run: box", &[150.0]), ("exec < run: box", &[15.0])]);
        let table = markdown(&steps);
        assert!(table.contains("| run | box | 150.0 | 150.0 | ms | 1.50 | run: floor |\n"), "{table}");
        assert!(table.contains("| exec |  | 15.0 | 15.0 | ms | 0.10 | run: box |\n"), "{table}");
        let parsed: serde_json::Value = serde_json::from_str(&json(&steps)).unwrap();
        assert_eq!(parsed[1]["ratio"], 1.5);
        assert_eq!(parsed[2]["to"], "run: box");
    }
}
