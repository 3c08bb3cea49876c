//! The run as a picture: panels over a common time axis, on white, which is legible on a dark page, too.

use std::path::Path;

use plotters::{
    coord::Shift,
    prelude::{
        Color, DrawingArea, IntoDrawingArea, IntoFont, PathElement, Polygon, RGBColor, Rectangle,
        SVGBackend, Text, WHITE,
    },
    style::{
        FontStyle, ShapeStyle, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};
use tower_bearer::BoxError;

use crate::run::{Action, LIFETIME, Record, Sample};

/// Draws the run into a file.
pub(crate) fn draw(file: &Path, record: &Record) -> Result<(), BoxError> {
    let root = SVGBackend::new(file, (WIDTH as u32, HEIGHT as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let end = record.samples.last().map_or(1.0, |sample| sample.at);
    Picture { root, record, end }.draw()
}

struct Picture<'a> {
    root: DrawingArea<SVGBackend<'a>, Shift>,
    record: &'a Record,
    /// When the run ended, in seconds.
    end: f64,
}

/// A strip of the picture with an axis of its own.
struct Panel {
    top: i32,
    bottom: i32,
    /// The value at its top.
    most: f64,
}

impl Panel {
    fn y(&self, value: f64) -> i32 {
        let height = f64::from(self.bottom - self.top);
        self.bottom - (height * (value / self.most).clamp(0.0, 1.0)).round() as i32
    }
}

type Drawn = Result<(), BoxError>;

impl Picture<'_> {
    fn draw(&self) -> Drawn {
        let title = "Requests and their token under interference";
        self.text(title, (LEFT, 26), 19, INK, HPos::Left, FontStyle::Bold)?;
        let record = self.record;
        let summary = format!(
            "{} requests, {} token requests. {} were refused for a revoked token and sent again; {} failed, {} of them \
             despite a valid token.",
            record.answered + record.failures.len(),
            record.token_requests.len(),
            record.refused,
            record.failures.len(),
            record.needless,
        );
        self.note(&summary, (LEFT, 50), 13, GREY, HPos::Left)?;

        let highest = |value: fn(&Sample) -> f64| {
            let all = record.samples.iter().map(value);
            all.fold(1.0, f64::max)
        };
        let rates = Panel {
            top: 122,
            bottom: 288,
            most: highest(|s| s.answered.max(s.failed)) * 1.08,
        };
        let waiting = Panel {
            top: 330,
            bottom: 424,
            most: highest(|s| s.waiting as f64) * 1.12,
        };
        let age = Panel {
            top: 466,
            bottom: 584,
            most: LIFETIME.as_secs_f64() * 1.08,
        };
        let requests = Panel {
            top: 626,
            bottom: 650,
            most: 1.0,
        };
        let panels = [&rates, &waiting, &age, &requests];
        self.bands(&panels)?;
        for panel in &panels[..3] {
            self.grid(panel)?;
        }
        self.seconds(&panels)?;
        self.actions(&panels)?;

        self.caption(
            &rates,
            "requests per second",
            &[("answered", BLUE), ("failed", RED)],
        )?;
        self.area(&rates, |s| s.answered, BLUE)?;
        self.area(&rates, |s| s.failed, RED)?;
        self.caption(&waiting, "requests waiting for a token", &[])?;
        self.bars(&waiting, |s| s.waiting as f64, AMBER)?;
        self.caption(&age, "age of the token in seconds", &[])?;
        self.age(&age)?;
        let outcomes = [("granted", GREEN), ("failed", RED)];
        self.caption(&requests, "token requests, from start to answer", &outcomes)?;
        self.token_requests(&requests)?;
        self.root.present()?;
        Ok(())
    }

    fn x(&self, at: f64) -> i32 {
        let width = f64::from(RIGHT - LEFT);
        LEFT + (width * (at / self.end).clamp(0.0, 1.0)).round() as i32
    }

    /// Shades the times during which the token endpoint was slow or down.
    fn bands(&self, panels: &[&Panel]) -> Drawn {
        let actions = &self.record.actions;
        for (at, action) in actions {
            let colour = match action {
                Action::Slow(true) => AMBER,
                Action::Break(true) => RED,
                _ => continue,
            };
            let ends = |other: &Action| match action {
                Action::Slow(_) => matches!(other, Action::Slow(false)),
                _ => matches!(other, Action::Break(false)),
            };
            let mut later = actions.iter().filter(|(other, _)| other > at);
            let end = later.find(|(_, other)| ends(other));
            let end = end.map_or(self.end, |(end, _)| *end);
            for panel in panels {
                let corners = [(self.x(*at), panel.top), (self.x(end), panel.bottom)];
                self.root
                    .draw(&Rectangle::new(corners, colour.mix(0.10).filled()))?;
            }
        }
        Ok(())
    }

    /// Draws and labels the grid lines of a panel.
    fn grid(&self, panel: &Panel) -> Drawn {
        let step = step(panel.most);
        let mut value = 0.0;
        while value <= panel.most {
            let y = panel.y(value);
            let line = PathElement::new(vec![(LEFT, y), (RIGHT, y)], FAINT.stroke_width(1));
            self.root.draw(&line)?;
            self.note(&format!("{value:.0}"), (LEFT - 8, y), 12, GREY, HPos::Right)?;
            value += step;
        }
        Ok(())
    }

    /// Labels the seconds, below all panels.
    fn seconds(&self, panels: &[&Panel]) -> Drawn {
        let bottom = panels.iter().map(|panel| panel.bottom).max().unwrap_or(0);
        for second in 0..=self.end.round() as u32 {
            let x = self.x(f64::from(second));
            let tick = vec![(x, bottom), (x, bottom + 5)];
            self.root
                .draw(&PathElement::new(tick, GREY.stroke_width(1)))?;
            self.note(
                &second.to_string(),
                (x, bottom + 16),
                12,
                GREY,
                HPos::Center,
            )?;
        }
        let line = vec![(LEFT, bottom), (RIGHT, bottom)];
        self.root
            .draw(&PathElement::new(line, GREY.stroke_width(1)))?;
        let middle = (LEFT + RIGHT) / 2;
        self.note("seconds", (middle, bottom + 36), 12, GREY, HPos::Center)
    }

    /// Names a panel, and what its colours stand for.
    fn caption(&self, panel: &Panel, name: &str, colours: &[(&str, RGBColor)]) -> Drawn {
        let y = panel.top - 14;
        self.text(name, (LEFT, y), 13, INK, HPos::Left, FontStyle::Bold)?;
        // Keeps the lines across the panels out of the legend.
        let width: i32 = colours.iter().map(|(name, _)| entry_width(name)).sum();
        let background = [(RIGHT - width, y - 8), (RIGHT + 1, y + 8)];
        self.root
            .draw(&Rectangle::new(background, WHITE.filled()))?;
        let mut x = RIGHT;
        for (name, colour) in colours.iter().rev() {
            let left = x - entry_width(name) + 20;
            let sample = [(left, y - 5), (left + 10, y + 5)];
            self.root.draw(&Rectangle::new(sample, colour.filled()))?;
            self.note(name, (left + 16, y), 13, *colour, HPos::Left)?;
            x -= entry_width(name);
        }
        Ok(())
    }

    fn area(&self, panel: &Panel, value: fn(&Sample) -> f64, colour: RGBColor) -> Drawn {
        let samples = &self.record.samples;
        // Draws from zero to zero, but no zeros between: a line along the bottom would hide that of another value.
        let at = |index: usize| samples.get(index).map_or(0.0, value);
        let is_part = |index: usize| at(index) + at(index + 1) + at(index.wrapping_sub(1)) > 0.0;
        let parts: Vec<_> = (0..samples.len())
            .map(|i| is_part(i).then_some(&samples[i]))
            .collect();
        for part in parts.split(Option::is_none) {
            let part = part.iter().flatten();
            let line: Vec<_> = part.map(|s| (self.x(s.at), panel.y(value(s)))).collect();
            let (Some(first), Some(last)) = (line.first(), line.last()) else {
                continue;
            };
            let mut shape = vec![(first.0, panel.bottom)];
            shape.extend(&line);
            shape.push((last.0, panel.bottom));
            self.root
                .draw(&Polygon::new(shape, colour.mix(0.18).filled()))?;
            self.root
                .draw(&PathElement::new(line, colour.stroke_width(2)))?;
        }
        Ok(())
    }

    fn bars(&self, panel: &Panel, value: fn(&Sample) -> f64, colour: RGBColor) -> Drawn {
        let mut left = LEFT;
        for sample in &self.record.samples {
            let right = self.x(sample.at);
            if value(sample) > 0.0 {
                let corners = [(left, panel.y(value(sample))), (right - 1, panel.bottom)];
                self.root.draw(&Rectangle::new(corners, colour.filled()))?;
            }
            left = right;
        }
        Ok(())
    }

    fn age(&self, panel: &Panel) -> Drawn {
        let limit = LIFETIME.as_secs_f64() * 0.9;
        let y = panel.y(limit);
        for x in (LEFT..RIGHT).step_by(8) {
            let dash = vec![(x, y), (x + 4, y)];
            self.root
                .draw(&PathElement::new(dash, RED.stroke_width(1)))?;
        }
        let name = "no longer attached";
        let background = [(RIGHT - 110, y - 16), (RIGHT, y - 3)];
        self.root
            .draw(&Rectangle::new(background, WHITE.filled()))?;
        self.note(name, (RIGHT, y - 9), 12, RED, HPos::Right)?;
        let mut line = Vec::new();
        for (index, sample) in self.record.samples.iter().enumerate() {
            let before = index
                .checked_sub(1)
                .and_then(|i| self.record.samples[i].age);
            // A younger token is another one.
            if sample.age.is_none() || sample.age < before {
                self.stroke(std::mem::take(&mut line), GREEN)?;
            }
            if let Some(age) = sample.age {
                line.push((self.x(sample.at), panel.y(age)));
            }
        }
        self.stroke(line, GREEN)
    }

    fn stroke(&self, line: Vec<(i32, i32)>, colour: RGBColor) -> Drawn {
        if line.len() > 1 {
            self.root
                .draw(&PathElement::new(line, colour.stroke_width(2)))?;
        }
        Ok(())
    }

    fn token_requests(&self, panel: &Panel) -> Drawn {
        for exchange in &self.record.token_requests {
            let (granted, end) = exchange.answer.unwrap_or((true, self.end));
            let colour = if granted { GREEN } else { RED };
            let left = self.x(exchange.at);
            let right = self.x(end).max(left + 3);
            let corners = [(left, panel.top + 4), (right, panel.bottom - 4)];
            self.root.draw(&Rectangle::new(corners, colour.filled()))?;
        }
        Ok(())
    }

    /// Marks the interference, across all panels.
    fn actions(&self, panels: &[&Panel]) -> Drawn {
        let bottom = panels.iter().map(|panel| panel.bottom).max().unwrap_or(0);
        let style: ShapeStyle = INK.mix(0.55).stroke_width(1);
        for (index, (at, action)) in self.record.actions.iter().enumerate() {
            let x = self.x(*at);
            // In two rows, since they may follow each other closely.
            let y = if index % 2 == 0 { 76 } else { 92 };
            let mut top = y + 8;
            while top < bottom {
                let dash = vec![(x, top), (x, (top + 3).min(bottom))];
                self.root.draw(&PathElement::new(dash, style))?;
                top += 6;
            }
            self.text(
                &action.to_string(),
                (x, y),
                12,
                INK,
                HPos::Center,
                FontStyle::Normal,
            )?;
        }
        Ok(())
    }

    fn note(&self, text: &str, at: (i32, i32), size: u32, colour: RGBColor, anchor: HPos) -> Drawn {
        self.text(text, at, size, colour, anchor, FontStyle::Normal)
    }

    fn text(
        &self,
        text: &str,
        at: (i32, i32),
        size: u32,
        colour: RGBColor,
        anchor: HPos,
        font: FontStyle,
    ) -> Drawn {
        let style = TextStyle::from((FONT, size).into_font().style(font));
        let style = style.color(&colour).pos(Pos::new(anchor, VPos::Center));
        self.root.draw(&Text::new(text.to_owned(), at, style))?;
        Ok(())
    }
}

/// The width of a legend entry in a wide font.
fn entry_width(name: &str) -> i32 {
    7 * name.len() as i32 + 34
}

/// A round distance between the grid lines of a panel, for two to five of them.
fn step(most: f64) -> f64 {
    let power = 10_f64.powf((most / 2.0).log10().floor());
    let steps = [5.0, 2.0, 1.0].into_iter().map(|digit| digit * power);
    steps
        .into_iter()
        .find(|step| step * 2.0 <= most)
        .unwrap_or(most)
}

const WIDTH: i32 = 960;
const HEIGHT: i32 = 700;
const LEFT: i32 = 62;
const RIGHT: i32 = WIDTH - 26;
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(34, 34, 34);
const GREY: RGBColor = RGBColor(110, 110, 110);
const FAINT: RGBColor = RGBColor(230, 230, 230);
// Distinguishable by the colour-blind, too (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const AMBER: RGBColor = RGBColor(230, 159, 0);
