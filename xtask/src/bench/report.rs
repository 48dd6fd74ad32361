//! What was measured, beside what it should be.

use std::fmt;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::{Serialize, Serializer, ser::SerializeStruct as _};

/// All that one run found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    /// Smaller sizes: the numbers show that the parts run, and little else.
    pub(super) quick: bool,
    pub(super) parts: Vec<PartReport>,
    /// What `interop` compared, beside the other fields as `real`, `ours` and `ratios`.
    #[serde(flatten)]
    pub(super) side_by_side: Option<SideBySide>,
}

/// Fields of a JSON object that are handed on as they were measured.
pub(super) type SideBySide = serde_json::Map<String, serde_json::Value>;

/// Where it was measured, and what else ran there.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) cpus: usize,
    /// Load average of the last minute, before and after. The benchmarks themselves are in the second.
    pub(super) load_before: f64,
    pub(super) load_after: f64,
}

/// What one part found.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct PartReport {
    pub(super) part: String,
    pub(super) rows: Vec<Row>,
    /// What the numbers include, and how they came about.
    pub(super) notes: Vec<String>,
    /// Why the part did not run to its end.
    pub(super) error: Option<String>,
    /// What it was doing then.
    pub(super) failed_step: Option<String>,
}

/// One number.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) what: String,
    pub(super) value: f64,
    pub(super) unit: &'static str,
    bar: Option<Bar>,
    pub(super) n: u64,
}

/// A number to hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    /// A number without a bar that stands on `n` samples; a mean on as many as its total was divided by.
    pub(super) fn new(what: impl Into<String>, value: f64, unit: &'static str, n: u64) -> Self {
        Self {
            what: what.into(),
            value,
            unit,
            bar: None,
            n,
        }
    }

    pub(super) fn bar(mut self, bar: Bar) -> Self {
        self.bar = Some(bar);
        self
    }

    pub(super) fn holds(&self) -> Option<bool> {
        // What is not a number holds no bar.
        Some(match self.bar? {
            Bar::AtMost(bar) => self.value <= bar,
            Bar::AtLeast(bar) => self.value >= bar,
        })
    }
}

/// One line, for those who wait for the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, number(self.value))?;
        if !self.unit.is_empty() {
            write!(f, " {}", self.unit)?;
        }
        write!(f, " (n {}", self.n)?;
        if let (Some(bar), Some(holds)) = (self.bar, self.holds()) {
            let missed = if holds { "" } else { ", missed" };
            write!(f, ", bar {}{missed}", self::bar(bar))?;
        }
        f.write_str(")")
    }
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (least, most) = match self.bar {
            Some(Bar::AtLeast(bar)) => (Some(bar), None),
            Some(Bar::AtMost(bar)) => (None, Some(bar)),
            None => (None, None),
        };
        let mut row = serializer.serialize_struct("Row", 7)?;
        row.serialize_field("what", &self.what)?;
        row.serialize_field("value", &self.value)?;
        row.serialize_field("unit", self.unit)?;
        row.serialize_field("at_least", &least)?;
        row.serialize_field("at_most", &most)?;
        row.serialize_field("ok", &self.holds())?;
        row.serialize_field("n", &self.n)?;
        row.end()
    }
}

impl Report {
    /// Whether every part ran to its end; missed bars are no failure.
    pub(super) fn is_whole(&self) -> bool {
        self.parts.iter().all(|part| part.error.is_none())
    }

    /// One JSON object.
    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// As people read it.
    pub(super) fn render(&self) -> String {
        let mut text = self.table();
        let quick = if self.quick {
            "; --quick: sizes too small for numbers to rely on"
        } else {
            ""
        };
        text.push_str(&format!("\n{}{quick}\n", self.machine.line()));
        text.push_str(
            "N: samples that a row stands on; of a mean, what its total was divided by\n",
        );
        for part in &self.parts {
            text.push_str(&part.remarks());
        }
        text
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["PART", "WHAT", "VALUE", "UNIT", "N", "BAR", ""]);
        for part in &self.parts {
            for (index, row) in part.rows.iter().enumerate() {
                let name = if index == 0 { part.part.as_str() } else { "" };
                table.add_row([
                    name,
                    &row.what,
                    &number(row.value),
                    row.unit,
                    &row.n.to_string(),
                    &row.bar.map(bar).unwrap_or_default(),
                    match row.holds() {
                        Some(true) => "ok",
                        Some(false) => "missed",
                        None => "",
                    },
                ]);
            }
            if part.error.is_some() {
                let what = part.failed_at();
                table.add_row([part.part.as_str(), &what, "", "", "", "", "failed"]);
            }
        }
        lines(table, &[2, 4, 5])
    }
}

impl PartReport {
    fn failed_at(&self) -> String {
        match &self.failed_step {
            Some(step) => format!("stopped in: {step}"),
            None => "could not be measured".to_owned(),
        }
    }

    /// Notes, and why it did not run to its end.
    fn remarks(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            text.push_str(&format!("{}: {note}\n", self.part));
        }
        if let Some(error) = &self.error {
            text.push_str(&format!("{}: {}: {error}\n", self.part, self.failed_at()));
        }
        text
    }
}

impl Machine {
    /// One line.
    pub(super) fn line(&self) -> String {
        format!(
            "Linux {}, {} CPUs, load {} before and {} after",
            self.kernel, self.cpus, self.load_before, self.load_after
        )
    }
}

/// The table's lines, with these columns aligned to the right.
pub(super) fn lines(mut table: Table, to_the_right: &[usize]) -> String {
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if to_the_right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn bar(bar: Bar) -> String {
    match bar {
        Bar::AtMost(bar) => format!("≤ {}", number(bar)),
        Bar::AtLeast(bar) => format!("≥ {}", number(bar)),
    }
}

/// Three digits or so: more would be noise.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rows: Vec<Row>, error: Option<&str>) -> Report {
        Report {
            machine: Machine {
                kernel: "6.18".into(),
                cpus: 2,
                load_before: 0.5,
                load_after: 1.5,
            },
            quick: false,
            parts: vec![PartReport {
                part: "proxy".into(),
                rows,
                notes: vec!["on loopback".into()],
                error: error.map(str::to_owned),
                failed_step: error.map(|_| "the last step".to_owned()),
            }],
            side_by_side: None,
        }
    }

    #[test]
    fn a_bar_is_held_or_missed() {
        let row = |value| Row::new("x", value, "ms", 1);
        assert_eq!(row(1.0).holds(), None);
        assert_eq!(row(5.0).bar(Bar::AtMost(5.0)).holds(), Some(true));
        assert_eq!(row(5.1).bar(Bar::AtMost(5.0)).holds(), Some(false));
        assert_eq!(row(0.97).bar(Bar::AtLeast(0.97)).holds(), Some(true));
        assert_eq!(row(f64::NAN).bar(Bar::AtLeast(0.0)).holds(), Some(false));
    }

    #[test]
    fn a_missed_bar_is_shown_and_no_failure() {
        let mut report = report(
            vec![
                Row::new("pairs", 2900.0, "/s", 500).bar(Bar::AtLeast(3000.0)),
                Row::new("p99", 4.25, "ms", 499).bar(Bar::AtMost(5.0)),
            ],
            None,
        );
        let text = report.render();
        let line = |word: &str| text.lines().find(|line| line.contains(word)).unwrap();
        assert!(line("pairs").contains("≥ 3000") && line("pairs").ends_with("missed"));
        assert!(line("p99").contains("4.25") && line("p99").ends_with("ok"));
        assert!(text.contains("proxy: on loopback"));
        assert!(report.is_whole());
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["parts"][0]["rows"][0]["ok"], false);
        assert_eq!(json["parts"][0]["rows"][1]["at_most"], 5.0);
        assert_eq!(json["parts"][0]["rows"][1]["n"], 499);
        assert!(line("p99").contains(" 499 "), "{text}");
        assert!(json.get("ratios").is_none());
        let compared = serde_json::json!({"ratios": {"p99": 0.1}});
        report.side_by_side = compared.as_object().cloned();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["ratios"]["p99"], 0.1);
    }

    #[test]
    fn a_part_that_failed_shows_the_rows_it_has_and_where_it_stopped() {
        let rows = vec![Row::new("pairs", 2900.0, "/s", 500)];
        let report = report(rows, Some("no iperf3\nsecond line"));
        assert!(!report.is_whole());
        let text = report.render();
        assert!(text.contains("2900") && text.contains("failed"), "{text}");
        let error = "proxy: stopped in: the last step: no iperf3\nsecond line";
        assert!(text.contains(error), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["parts"][0]["rows"][0]["value"], 2900.0);
        assert_eq!(json["parts"][0]["failed_step"], "the last step");
    }

    #[test]
    fn a_row_is_one_line() {
        let row = Row::new("pairs", 2900.0, "/s", 500);
        assert_eq!(row.to_string(), "pairs: 2900 /s (n 500)");
        let missed = row.bar(Bar::AtLeast(3000.0)).to_string();
        assert_eq!(missed, "pairs: 2900 /s (n 500, bar ≥ 3000, missed)");
    }
}
