//! The guides name the tests that back them, as `<!-- FILE: TEST, TEST -->`.

use std::{collections::HashMap, fs, path::Path};

fn read(path: impl AsRef<Path>) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_test_that_a_guide_names_exists() {
    let mut sources = HashMap::new();
    let pages = [
        ("clients", 3),
        ("failures", 45),
        ("migration", 10),
        ("security", 30),
        ("servers", 18),
    ];
    for (page, least) in pages {
        let text = read(format!("src/guide/{page}.md"));
        let comments = text.split("<!--").skip(1);
        let comments = comments.filter_map(|rest| rest.split_once("-->"));
        let mut named = 0;
        for (comment, _) in comments {
            let (file, tests) = comment
                .split_once(':')
                .unwrap_or_else(|| panic!("{page}: {comment}"));
            let file = file.trim();
            let source = sources.entry(file.to_owned()).or_insert_with(|| read(file));
            for test in tests.split(',').map(str::trim) {
                assert!(
                    source.contains(&format!("fn {test}(")),
                    "{page}: there is no {test} in {file}"
                );
                named += 1;
            }
        }
        assert!(named >= least, "{page} names {named} tests");
    }
}

/// A test backs each row of the page's first three tables.
#[test]
fn a_test_backs_every_situation_of_the_guide_to_failures() {
    let text = read("src/guide/failures.md");
    let (situations, _) = text
        .split_once("# What each error means")
        .expect("the page has this section");
    let rows = situations.lines().filter(|line| line.starts_with("| "));
    let heads = ["| token | endpoint |", "| the answer |", "| situation |"];
    let rows = rows.filter(|row| !heads.iter().any(|head| row.starts_with(head)));
    assert_eq!(rows.clone().count(), 32);
    for row in rows {
        assert!(row.contains("<!-- "), "{row}");
    }
}

/// People look up the events of their log by message.
#[test]
fn the_guide_to_failures_lists_every_message_from_info_up() {
    let text = read("src/guide/failures.md");
    let (_, alerts) = text.split_once("# How to alert").expect("the section");
    let source = read("src/telemetry/mod.rs");
    let mut found = 0;
    for event in source.split("emit!(").skip(1) {
        let Some(level) = ["WARN", "INFO"]
            .into_iter()
            .find(|level| event.trim_start().starts_with(level))
        else {
            continue;
        };
        // In the event itself, or passed to the macro that contains it.
        let own = event
            .lines()
            .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","));
        let handed = event.split("tell!(").skip(1);
        let handed = handed.filter_map(|call| call.split('"').nth(1));
        let messages: Vec<_> = own.chain(handed).collect();
        assert!(!messages.is_empty(), "no message in {event}");
        for message in messages {
            let cell = format!("| {level} {message} |");
            assert!(alerts.contains(&cell), "there is no {cell}");
            found += 1;
        }
    }
    assert_eq!(found, 11);
}
