//! The two kinds of plots, as SVG on white, which is legible on a dark page, too.

use std::path::Path;

use plotters::{
    prelude::{
        BLACK, ChartBuilder, Circle, Color, IntoDrawingArea, IntoFont, IntoLogRange, LineSeries,
        PathElement, RGBColor, Rectangle, SVGBackend, Text, WHITE,
    },
    style::{
        ShapeStyle, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

/// A line through points.
pub struct Line<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

/// The axis of a [chart](lines).
pub struct Axis<'a> {
    pub name: &'a str,
    /// The ratio of two successive steps.
    pub base: f64,
    pub label: &'a dyn Fn(&f64) -> String,
}

/// Draws lines over two logarithmic axes.
pub fn lines(path: &Path, title: &str, x: Axis<'_>, y: Axis<'_>, lines: &[Line<'_>]) {
    let all = || lines.iter().flat_map(|line| line.points.iter().copied());
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), value| {
            (low.min(value), high.max(value))
        })
    };
    let (left, right) = range(&mut all().map(|(x, _)| x));
    let (bottom, top) = range(&mut all().map(|(_, y)| y));
    let root = SVGBackend::new(path, (WIDTH, 460)).into_drawing_area();
    root.fill(&WHITE).expect(DRAWN);
    let (plot, legend) = root.split_horizontally(WIDTH - 230);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, (FONT, 18))
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(76)
        .build_cartesian_2d(
            (left..right * 1.001).log_scale().base(x.base),
            (bottom / 1.3..top * 1.3).log_scale().base(y.base),
        )
        .expect(DRAWN);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .x_desc(x.name)
        .y_desc(y.name)
        .x_label_formatter(x.label)
        .y_label_formatter(y.label)
        .draw()
        .expect(DRAWN);
    for (index, line) in lines.iter().enumerate() {
        let style = stroke(index);
        let series = LineSeries::new(line.points.iter().copied(), style);
        chart.draw_series(series).expect(DRAWN);
        if line.points.len() < 20 {
            let dots = line.points.iter();
            let dots = dots.map(|point| Circle::new(*point, 3, style.filled()));
            chart.draw_series(dots).expect(DRAWN);
        }
        // Beside the lines, where the legend hides none.
        let y = 60 + 24 * i32::try_from(index).unwrap_or(0);
        let sample = PathElement::new(vec![(4, y), (26, y)], style);
        legend.draw(&sample).expect(DRAWN);
        let name = Text::new(line.name.to_owned(), (34, y), text(13, HPos::Left));
        legend.draw(&name).expect(DRAWN);
    }
    root.present().expect("the plot can be written");
}

/// Draws a bar for each name, with the value at its end.
pub fn bars(path: &Path, title: &str, unit: &str, bars: &[(String, f64)]) {
    let step = 26;
    let count = i32::try_from(bars.len()).unwrap_or(0);
    let height = 60 + step * count + 14;
    let root = SVGBackend::new(path, (WIDTH, u32::try_from(height).unwrap_or(0)));
    let root = root.into_drawing_area();
    root.fill(&WHITE).expect(DRAWN);
    let (left, right) = (230, i32::try_from(WIDTH).unwrap_or(0) - 90);
    let centre = i32::try_from(WIDTH / 2).unwrap_or(0);
    let title = Text::new(title.to_owned(), (centre, 22), text(18, HPos::Center));
    root.draw(&title).expect(DRAWN);
    let most = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    for (index, (name, value)) in bars.iter().enumerate() {
        let y = 58 + step * i32::try_from(index).unwrap_or(0);
        let colour = if name.contains("bearer") {
            COLOURS[0]
        } else {
            GREY
        };
        let end = left + (f64::from(right - left) * value / most) as i32;
        let bar = Rectangle::new([(left, y - 9), (end, y + 9)], colour.filled());
        root.draw(&bar).expect(DRAWN);
        let name = Text::new(name.clone(), (left - 10, y), text(13, HPos::Right));
        root.draw(&name).expect(DRAWN);
        let value = Text::new(
            format!("{value:.0} {unit}"),
            (end + 8, y),
            text(13, HPos::Left),
        );
        root.draw(&value).expect(DRAWN);
    }
    root.present().expect("the plot can be written");
}

fn stroke(index: usize) -> ShapeStyle {
    COLOURS[index % COLOURS.len()].stroke_width(2)
}

fn text<'a>(size: u32, position: HPos) -> TextStyle<'a> {
    let style = TextStyle::from((FONT, size).into_font());
    style.pos(Pos::new(position, VPos::Center))
}

const WIDTH: u32 = 900;
const FONT: &str = "sans-serif";
const DRAWN: &str = "the plot can be drawn";
const GREY: RGBColor = RGBColor(150, 150, 150);
/// Distinguishable by the colour-blind, too (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
    RGBColor(0, 0, 0),
];
