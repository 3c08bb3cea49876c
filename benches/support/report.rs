//! Tables on the terminal, as CSV in `target/bench-results`, and in `benches/README.md`.

use std::{
    fmt::Write as _,
    fs, mem,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use super::short;

/// The results of one benchmark.
pub struct Report {
    name: &'static str,
    goals: Table,
    tables: Vec<Table>,
    details: Vec<Table>,
}

/// Rows under a header. The first column names the row.
pub struct Table {
    /// Part of the name of its file.
    name: &'static str,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(name: &'static str, header: &[&str]) -> Self {
        let header = header.iter().map(ToString::to_string).collect();
        Self {
            name,
            rows: vec![header],
        }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows[0].len();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..columns).map(width).collect()
    }

    fn print(&self) {
        let widths = self.widths();
        println!("\n{}", self.name);
        for row in &self.rows {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = match index {
                    0 => write!(line, "  {cell:<width$}"),
                    _ => write!(line, "  {cell:>width$}"),
                };
            }
            println!("{}", line.trim_end());
        }
    }

    /// Goals are too long for columns.
    fn print_goals(&self) {
        println!();
        for row in &self.rows[1..] {
            if let [work, goal, measured, verdict] = row.as_slice() {
                println!("{verdict}: {work}\n  goal      {goal}\n  measured  {measured}");
            }
        }
    }

    fn csv(&self) -> String {
        let line = |row: &Vec<String>| {
            let quoted = row.iter().map(|cell| match cell.contains([',', '"']) {
                true => format!("\"{}\"", cell.replace('"', "\"\"")),
                false => cell.clone(),
            });
            quoted.collect::<Vec<_>>().join(",") + "\n"
        };
        self.rows.iter().map(line).collect()
    }

    fn markdown(&self) -> String {
        let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
        let rule: Vec<_> = (0..self.rows[0].len())
            .map(|column| if column == 0 { "---" } else { "--:" }.to_owned())
            .collect();
        let mut text = line(&self.rows[0]) + &line(&rule);
        text.extend(self.rows[1..].iter().map(line));
        text
    }
}

impl Report {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            goals: Table::new(GOALS, &["work", "goal", "measured", ""]),
            tables: Vec::new(),
            details: Vec::new(),
        }
    }

    /// Adds a goal, and how close the measurement came.
    pub fn goal(&mut self, work: &str, goal: &str, measured: String, met: bool) {
        let verdict = if met { "met" } else { "missed" };
        let row = [work, goal, &measured, verdict];
        self.goals.row(row.map(ToOwned::to_owned));
    }

    pub fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Adds a table that is written only to its file.
    pub fn detail(&mut self, table: Table) {
        self.details.push(table);
    }

    /// Prints and writes all tables; into the README only after a full run.
    pub fn finish(mut self) {
        if self.goals.rows.len() > 1 {
            let goals = mem::replace(&mut self.goals, Table::new(GOALS, &[]));
            self.tables.insert(0, goals);
        }
        for table in &self.details {
            self.write(table);
        }
        let mut section = format!("Measured on {}.\n", machine());
        for table in &self.tables {
            match table.name {
                GOALS => table.print_goals(),
                _ => table.print(),
            }
            self.write(table);
            let _ = write!(section, "\n{}", table.markdown());
        }
        if !short() {
            fill_in(self.name, &section);
        }
    }

    fn write(&self, table: &Table) {
        let path = results().join(format!("{}.{}.csv", self.name, table.name));
        fs::write(path, table.csv()).expect("the results can be written");
    }
}

/// Where a plot goes: only a full run replaces those of the README.
pub fn plot_path(name: &str) -> PathBuf {
    let directory = match short() {
        true => results(),
        false => Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/plots"),
    };
    fs::create_dir_all(&directory).expect("the directory of the plots can be made");
    directory.join(format!("{name}.svg"))
}

/// `target/bench-results`.
fn results() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
    let directory = target
        .expect("it is in the target directory")
        .join("bench-results");
    fs::create_dir_all(&directory).expect("the directory of the results can be made");
    directory
}

/// Puts `section` into the README, between the two comments that name it.
fn fill_in(name: &str, section: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/README.md");
    let readme = fs::read_to_string(path).expect("there is a README");
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) = readme
        .split_once(&begin)
        .expect("the README has the section");
    let (_, after) = rest.split_once(&end).expect("the section ends");
    let readme = format!("{before}{begin}{section}{end}{after}");
    fs::write(path, readme).expect("the README can be written");
}

/// The machine and the compiler, as far as they are easily found out.
fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("an unnamed processor", |model| {
            model.trim_start_matches([' ', '\t', ':'])
        });
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel = kernel.split(['-', '\n']).next().unwrap_or_default();
    let compiler = Command::new("rustc").arg("--version").output();
    let compiler = compiler.map_or_else(
        |_| "rustc".to_owned(),
        |output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.split(" (").next().unwrap_or_default().to_owned()
        },
    );
    let cores = thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{model}, {cores} cores, {} {kernel}, {compiler}",
        std::env::consts::OS
    )
}

pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

/// The middle value.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

const GOALS: &str = "goals";
