//! The steps of a long command: each is named and timed in one place, and a table of all of them ends the command, also when one failed.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// A part of a step that took less is not worth a line.
const SHORTEST_PART: Duration = Duration::from_secs(1);

/// What ran until now.
#[derive(Debug)]
pub(crate) struct Steps {
    began: Instant,
    steps: Vec<Step>,
    /// What could not be done here, each with its reason.
    left_out: Vec<String>,
}

#[derive(Debug)]
struct Step {
    name: String,
    took: Duration,
    failed: bool,
    parts: Parts,
}

/// What a step consists of, for steps that know how long each part took.
#[derive(Debug, Default)]
pub(crate) struct Parts(Vec<(String, Duration)>);

impl Parts {
    pub(crate) fn add(&mut self, name: impl Into<String>, took: Duration) {
        self.0.push((name.into(), took));
    }
}

/// Does the work of a command in steps, and prints what took how long, whatever the outcome.
///
/// # Errors
/// Those of the work.
pub(crate) fn timed(work: impl FnOnce(&mut Steps) -> Result<()>) -> Result<()> {
    let mut steps = Steps::begin();
    let outcome = work(&mut steps);
    eprint!("{}", steps.table());
    outcome
}

/// The command as somebody would type it, without its environment.
fn as_typed(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

impl Steps {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            steps: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Records what a command leaves out and why: said at once and again at its end, so that nobody takes it for done.
    pub(crate) fn leave_out(&mut self, what: &str) {
        eprintln!("==> LEFT OUT: {what}");
        self.left_out.push(what.to_owned());
    }

    /// Runs a command as a step, its output going where ours goes.
    ///
    /// # Errors
    /// When it cannot be started, or fails.
    pub(crate) fn command(&mut self, name: &str, mut command: Command) -> Result<()> {
        self.run(name, || {
            let status = command
                .status()
                .with_context(|| format!("{name}: cannot start {}", as_typed(&command)))?;
            ensure!(
                status.success(),
                "{name} failed ({status}): {}",
                as_typed(&command)
            );
            Ok(())
        })
    }

    /// Runs a function as a step.
    ///
    /// # Errors
    /// Those of the function.
    pub(crate) fn run<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.run_in_parts(name, |_| work())
    }

    /// Runs a function as a step that says how long its parts took.
    ///
    /// # Errors
    /// Those of the function.
    pub(crate) fn run_in_parts<T>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut Parts) -> Result<T>,
    ) -> Result<T> {
        eprintln!("==> {name}");
        let (start, mut parts) = (Instant::now(), Parts::default());
        let outcome = work(&mut parts);
        let took = start.elapsed();
        if outcome.is_ok() {
            eprintln!("    {name}: {}", seconds(took));
        }
        self.steps.push(Step {
            name: name.to_owned(),
            took,
            failed: outcome.is_err(),
            parts,
        });
        outcome
    }

    /// A line for each step, the longest parts of a step below it, the time of the whole, and what was left out.
    fn table(&self) -> String {
        let mut lines = vec!["==> what took how long".to_owned()];
        let mut line = |took: Duration, indent: &str, text: &str| {
            lines.push(format!("    {:>9}  {indent}{text}", seconds(took)));
        };
        for step in &self.steps {
            let failed = if step.failed { " (failed)" } else { "" };
            line(step.took, "", &format!("{}{failed}", step.name));
            let mut parts: Vec<_> = step.parts.0.iter().collect();
            parts.retain(|(_, took)| *took >= SHORTEST_PART);
            parts.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
            for (name, took) in parts {
                line(*took, "  ", name);
            }
        }
        line(self.began.elapsed(), "", "all");
        for what in &self.left_out {
            lines.push(format!("==> LEFT OUT: {what}"));
        }
        lines.join("\n") + "\n"
    }
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_step_that_failed_is_in_the_table_with_those_before() {
        let mut steps = Steps::begin();
        steps.command("fine", Command::new("true")).unwrap();
        let outcome: Result<()> = steps.run("broken", || bail!("as it must"));
        assert_eq!(outcome.unwrap_err().to_string(), "as it must");
        let table = steps.table();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "==> what took how long");
        assert!(lines[1].ends_with(" s  fine"), "{table}");
        assert!(lines[2].ends_with(" s  broken (failed)"), "{table}");
        assert!(lines[3].ends_with(" s  all"), "{table}");
    }

    #[test]
    fn what_was_left_out_ends_the_table() {
        let mut steps = Steps::begin();
        steps.leave_out("the moon: no rocket");
        steps.command("fine", Command::new("true")).unwrap();
        assert!(
            steps
                .table()
                .ends_with(" s  all\n==> LEFT OUT: the moon: no rocket\n")
        );
    }

    #[test]
    fn a_command_that_fails_is_named() {
        let error = Steps::begin()
            .command("the step", Command::new("false"))
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the step failed (exit status: 1)")
        );
    }

    #[test]
    fn the_longest_parts_come_first_and_short_ones_not_at_all() {
        let mut steps = Steps::begin();
        steps
            .run_in_parts("tests", |parts| {
                parts.add("short", Duration::from_millis(999));
                parts.add("long", Duration::from_secs(5));
                parts.add("longer", Duration::from_secs(70));
                Ok(())
            })
            .unwrap();
        let table = steps.table();
        assert!(!table.contains("short"));
        let at = |text| table.find(text).unwrap();
        assert!(at("70.0 s    longer") < at("5.0 s    long\n"), "{table}");
    }
}
