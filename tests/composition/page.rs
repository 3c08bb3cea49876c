//! The page's table says exactly what the tests prove.

use std::collections::BTreeMap;

const PAGE: &str = include_str!("../../src/guide/placement.md");

const TESTS: &[&str] = &[
    include_str!("limits.rs"),
    include_str!("logs.rs"),
    include_str!("requests.rs"),
    include_str!("retries.rs"),
    include_str!("routes.rs"),
    include_str!("timeouts.rs"),
];

/// By the layer's name: the claims about it above and below.
type Table = BTreeMap<String, [String; 2]>;

/// The claims of one file's tests in order, those of one place joined.
fn claimed(table: &mut Table, source: &str) {
    let mut docs = Vec::new();
    for line in source.lines() {
        if let Some(doc) = line.strip_prefix("///") {
            docs.push(doc.trim());
            continue;
        }
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            let claim: Vec<_> = docs
                .iter()
                .copied()
                .take_while(|line| !line.is_empty())
                .collect();
            let claim = claim.join(" ");
            let (place, text) = claim.split_once(": ").unwrap_or_default();
            let Some((layer, place)) = place.rsplit_once(", ") else {
                panic!("a test without a claim: {docs:?}");
            };
            let column = match place {
                "above" => 0,
                "below" => 1,
                _ => panic!("neither above nor below: {claim}"),
            };
            let cell = &mut table.entry(layer.to_owned()).or_default()[column];
            if !cell.is_empty() {
                cell.push(' ');
            }
            cell.push_str(text);
        }
        docs.clear();
    }
}

/// The rows of the page's table, and where it says to put each layer.
fn written(page: &str) -> (Table, Vec<String>) {
    let mut table = Table::new();
    let mut places = Vec::new();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [layer, place, above, below] = cells[..] else {
            panic!("not four cells: {row}");
        };
        let layer = layer.replace('`', "");
        places.push(place.to_owned());
        let former = table.insert(layer, [above.to_owned(), below.to_owned()]);
        assert!(former.is_none(), "a second row: {row}");
    }
    (table, places)
}

#[test]
fn the_page_says_what_the_tests_prove() {
    let mut proven = Table::new();
    for source in TESTS {
        claimed(&mut proven, source);
    }
    let (written, places) = written(PAGE);
    for (layer, claims) in &proven {
        let row = claims.join(" | ");
        assert_eq!(
            written.get(layer),
            Some(claims),
            "the page's row of {layer} is not what the tests claim:\n{row}\n"
        );
    }
    for layer in written.keys() {
        assert!(proven.contains_key(layer), "no test is about {layer}");
    }
    assert!(places.iter().all(|place| !place.is_empty()));
    assert!(proven.len() > 15, "the tests were not found");
}
