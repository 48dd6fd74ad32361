//! What two revisions are to each other, row by row.

use anyhow::Result;
use comfy_table::{Table, presets};
use nsm_stats::{CONFIDENCE, Ratio, median, paired_ratio};
use serde_json::{Value, json};

use super::{
    super::report::{Machine, PartReport, Row, lines, number},
    revision::Revision,
};

/// The pairs of one part.
#[derive(Debug, Default)]
pub(super) struct Compared {
    part: String,
    /// Rows of the present programs and of the revision's.
    pairs: Vec<(Vec<Row>, Vec<Row>)>,
    /// Why pairs failed.
    pub(super) failures: Vec<String>,
    /// Why the part has too few of them.
    pub(super) error: Option<String>,
}

/// One row of both sides.
#[derive(Debug, PartialEq)]
struct Line {
    what: String,
    unit: &'static str,
    /// Medians of each side's values.
    now: f64,
    rev: f64,
    /// None where the values have no ratio, such as counts of nothing.
    ratio: Option<Ratio>,
    /// Pairs in which both sides have the row.
    n: usize,
    /// Pairs that have no ratio because one side found nothing.
    zeros: Zeros,
}

/// Pairs in which the value of one side only is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Zeros {
    now: usize,
    rev: usize,
}

impl Compared {
    pub(super) fn begin(part: String) -> Self {
        Self {
            part,
            ..Self::default()
        }
    }

    /// Adds a pair, and says in one line what it and those before found.
    pub(super) fn add(&mut self, now: Vec<Row>, rev: Vec<Row>) -> String {
        self.pairs.push((now, rev));
        let first = self.lines().into_iter().next();
        let ratio = first.and_then(|line| Some((line.what, line.ratio?.median)));
        ratio.map_or_else(String::new, |(what, median)| {
            format!("{what}: ratio {} until now", number(median))
        })
    }

    pub(super) fn pairs(&self) -> usize {
        self.pairs.len()
    }

    pub(super) fn is_whole(&self) -> bool {
        self.error.is_none()
    }

    /// In the order in which the present programs have them. A row that only one side has is not compared.
    fn lines(&self) -> Vec<Line> {
        let Some((first, _)) = self.pairs.first() else {
            return Vec::new();
        };
        first.iter().filter_map(|row| self.line(row)).collect()
    }

    fn line(&self, row: &Row) -> Option<Line> {
        let value = |rows: &[Row]| {
            let same = rows.iter().find(|other| other.what == row.what);
            same.map(|row| row.value)
        };
        let values: Vec<_> = self
            .pairs
            .iter()
            .filter_map(|(now, rev)| Some((value(now)?, value(rev)?)))
            .collect();
        let (now, rev): (Vec<_>, Vec<_>) = values.iter().copied().unzip();
        Some(Line {
            what: row.what.clone(),
            unit: row.unit,
            now: median(&now)?,
            rev: median(&rev)?,
            ratio: paired_ratio(&values, CONFIDENCE),
            n: values.len(),
            zeros: Zeros::of(&values),
        })
    }

    fn json(&self) -> Value {
        let rows: Vec<_> = self.lines().iter().map(Line::json).collect();
        json!({
            "part": self.part,
            "pairs": self.pairs.len(),
            "failed_pairs": self.failures,
            "rows": rows,
            "error": self.error,
        })
    }
}

impl Zeros {
    fn of(pairs: &[(f64, f64)]) -> Self {
        let count = |wanted| {
            let zeros = pairs.iter().map(|&(now, rev)| (now == 0.0, rev == 0.0));
            zeros.filter(|&found| found == wanted).count()
        };
        Self {
            now: count((true, false)),
            rev: count((false, true)),
        }
    }

    fn marks(self) -> impl Iterator<Item = String> {
        let sides = [("now", self.now), ("rev", self.rev)];
        let sides = sides.into_iter().filter(|&(_, pairs)| pairs > 0);
        sides.map(|(side, pairs)| {
            let plural = if pairs == 1 { "" } else { "s" };
            format!("only {side} is 0 in {pairs} pair{plural}")
        })
    }
}

impl Line {
    /// Whether the interval excludes that both are the same.
    fn differs(&self) -> Option<bool> {
        let interval = self.ratio?.interval?;
        Some(interval.low > 1.0 || interval.high < 1.0)
    }

    fn json(&self) -> Value {
        let interval = self.ratio.and_then(|ratio| ratio.interval);
        json!({
            "what": self.what,
            "unit": self.unit,
            "now": self.now,
            "rev": self.rev,
            "ratio": self.ratio.map(|ratio| ratio.median),
            "low": interval.map(|interval| interval.low),
            "high": interval.map(|interval| interval.high),
            "confidence": interval.map(|interval| interval.confidence),
            "differs": self.differs(),
            "n": self.ratio.map_or(self.n, |ratio| ratio.n),
            "only_now_is_0": self.zeros.now,
            "only_rev_is_0": self.zeros.rev,
        })
    }

    fn cells(&self, part: &str) -> [String; 8] {
        let interval = self.ratio.and_then(|ratio| ratio.interval);
        let interval = interval.map(|found| format!("{:.3} – {:.3}", found.low, found.high));
        let ratio = self.ratio.map(|ratio| format!("{:.3}", ratio.median));
        [
            part.to_owned(),
            self.what.clone(),
            ratio.unwrap_or_else(|| "–".to_owned()),
            interval.unwrap_or_else(|| "–".to_owned()),
            format!("{} {}", number(self.now), self.unit),
            format!("{} {}", number(self.rev), self.unit),
            self.ratio.map_or(self.n, |ratio| ratio.n).to_string(),
            self.marks(),
        ]
    }

    fn marks(&self) -> String {
        let differs = self.differs() == Some(true);
        let differs = differs.then(|| "differs".to_owned());
        let marks: Vec<_> = differs.into_iter().chain(self.zeros.marks()).collect();
        marks.join(", ")
    }
}

/// All that one comparison found.
pub(super) struct Report<'a> {
    pub(super) machine: Machine,
    pub(super) revision: &'a Revision,
    pub(super) calibration: Vec<PartReport>,
    pub(super) parts: &'a [Compared],
}

impl Report<'_> {
    /// One JSON object.
    pub(super) fn json(&self) -> Result<String> {
        let parts: Vec<_> = self.parts.iter().map(Compared::json).collect();
        Ok(serde_json::to_string(&json!({
            "machine": self.machine,
            "revision": self.revision,
            "calibration": self.calibration,
            "parts": parts,
        }))?)
    }

    /// As people read it.
    pub(super) fn render(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["PART", "WHAT", "NOW/REV", "95 %", "NOW", "REV", "N", ""]);
        for part in self.parts {
            for (index, line) in part.lines().iter().enumerate() {
                table.add_row(line.cells(if index == 0 { &part.part } else { "" }));
            }
        }
        let mut text = lines(table, &[2, 3, 4, 5, 6]);
        text.push_str(&format!("\n{}\n", self.machine.line()));
        for row in self.calibration.iter().flat_map(|part| &part.rows) {
            text.push_str(&format!("calibration: {row}\n"));
        }
        text.push_str(&format!(
            "now is the present tree, rev is {}: {}\n",
            self.revision.asked, self.revision.shown
        ));
        text.push_str(
            "NOW/REV: the median of the ratios of N pairs; 95 %: its interval by ranks (sign test, at least 95 %); NOW and REV: medians\n",
        );
        text.push_str("a pair with 0 on one side has no ratio, and is not among the N of a row that has one\n");
        text.push_str(
            "95 % is of a row and not of the table: of 20 rows without a difference one may be marked by chance: measure again\n",
        );
        for part in self.parts {
            let failed = part.failures.len();
            if failed > 0 {
                let of = part.pairs() + failed;
                text.push_str(&format!("{}: {failed} of {of} pairs failed\n", part.part));
            }
            for why in part.failures.iter().chain(&part.error) {
                text.push_str(&format!("{}: {why}\n", part.part));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(time: f64, lost: f64) -> Vec<Row> {
        vec![
            Row::new("set-up p50", time, "ms", 40),
            Row::new("lost", lost, "", 40),
        ]
    }

    fn compared(pairs: u32) -> Compared {
        let mut compared = Compared::begin("setup".to_owned());
        for pair in 0..pairs {
            // The machine gets slower all the time, and what is measured is a tenth faster all the time.
            let slow = f64::from(pair + 1);
            compared.add(rows(9.0 * slow, 0.0), rows(10.0 * slow, 0.0));
        }
        compared
    }

    fn report<'a>(revision: &'a Revision, parts: &'a [Compared]) -> Report<'a> {
        Report {
            machine: Machine {
                kernel: "6.18".into(),
                cpus: 2,
                load_before: 0.5,
                load_after: 1.5,
            },
            revision,
            calibration: Vec::new(),
            parts,
        }
    }

    fn revision() -> Revision {
        Revision {
            asked: "HEAD~1".into(),
            shown: "0000000 (Begin)".into(),
            ..Revision::default()
        }
    }

    #[test]
    fn ratios_are_of_pairs_and_not_of_medians() {
        let lines = compared(15).lines();
        let ratio = lines[0].ratio.unwrap();
        let interval = ratio.interval.unwrap();
        assert_eq!((ratio.median, interval.low, interval.high), (0.9, 0.9, 0.9));
        assert_eq!((lines[0].now, lines[0].rev, lines[0].n), (72.0, 80.0, 15));
        assert_eq!(lines[0].differs(), Some(true));
        // Nothing against nothing has no ratio, and is shown.
        assert_eq!((lines[1].ratio, lines[1].differs()), (None, None));
    }

    #[test]
    fn a_row_that_one_side_lacks_is_not_compared() {
        let mut compared = Compared::begin("setup".to_owned());
        compared.add(rows(1.0, 0.0), vec![Row::new("lost", 0.0, "", 40)]);
        let lines = compared.lines();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].what, "lost");
    }

    #[test]
    fn pairs_with_nothing_on_one_side_are_marked() {
        let mut compared = Compared::begin("proxy".to_owned());
        // Nothing is lost on both sides in two pairs, then on one side each.
        let lost = [(0.0, 0.0), (0.0, 0.0), (0.0, 3.0), (2.0, 0.0), (4.0, 0.0)];
        for (now, rev) in lost {
            compared.add(rows(1.0, now), rows(1.0, rev));
        }
        let parts = [compared];
        let revision = revision();
        let report = report(&revision, &parts);
        let text = report.render();
        let line = |what: &str| text.lines().find(|line| line.contains(what)).unwrap();
        let mark = "only now is 0 in 1 pair, only rev is 0 in 2 pairs";
        assert!(line("lost").ends_with(mark), "{text}");
        assert!(!line("set-up p50").contains("is 0"), "{text}");
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let rows = &json["parts"][0]["rows"];
        assert_eq!(
            (&rows[1]["only_now_is_0"], &rows[1]["only_rev_is_0"]),
            (&json!(1), &json!(2))
        );
        assert_eq!(
            (&rows[0]["only_now_is_0"], &rows[0]["only_rev_is_0"]),
            (&json!(0), &json!(0))
        );
    }

    #[test]
    fn what_chance_does_to_a_table_is_said_below_it() {
        let parts = [compared(16)];
        let revision = revision();
        let text = report(&revision, &parts).render();
        let said = "of 20 rows without a difference one may be marked by chance: measure again";
        assert!(text.contains(said), "{text}");
    }

    #[test]
    fn too_few_pairs_are_printed_with_what_failed() {
        let mut parts = [compared(2)];
        parts[0].failures.push("pair 3 of 15: Rev: no agent".into());
        parts[0].error = Some("only 2 of 15 pairs could be measured".into());
        let revision = revision();
        let report = report(&revision, &parts);
        let text = report.render();
        for expected in [
            "set-up p50",
            "0.900",
            "setup: 1 of 3 pairs failed",
            "setup: pair 3 of 15: Rev: no agent",
            "setup: only 2 of 15",
            "rev is HEAD~1: 0000000 (Begin)",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let part = &json["parts"][0];
        assert_eq!(part["rows"][0]["ratio"], 0.9);
        assert_eq!(part["rows"][0]["low"], Value::Null);
        assert_eq!(part["failed_pairs"][0], "pair 3 of 15: Rev: no agent");
    }
}
