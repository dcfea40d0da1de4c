//! Walls that no compiler guards: what the sources say of each other must be so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Who may read the environment: programs and tests, each of which is told by it; the library is told by its `Config`.
const READS_ENVIRONMENT: [&str; 6] = [
    "bench/src/cluster.rs",
    "crates/cli/src/config.rs",
    "crates/local/tests/cluster.rs",
    "crates/testkit/src/bin/therev-nemesis/world.rs",
    "crates/testkit/src/bin/with-test-servers.rs",
    "crates/testkit/src/servers.rs",
];
/// Whose SQL is not the library's: it breaks things on purpose, or stands beside the library to be compared.
const BESIDE: [&str; 2] = ["crates/testkit/", "bench/"];
/// What begins a statement that writes; the table follows.
const WRITES: [&str; 6] = ["INSERT INTO", "UPDATE", "DELETE FROM", "COPY", "MERGE INTO", "TRUNCATE"];

/// A file of the workspace, by its path in it.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Without its unit tests.
    fn code(&self) -> &str {
        self.text.split_once("#[cfg(test)]\nmod ").map_or(&self.text, |(code, _)| code)
    }

    /// Its tests: all of it, or what [`Source::code`] leaves.
    fn tests(&self) -> &str {
        let all = self.path.contains("/tests") || self.path.starts_with("crates/testkit/");
        if all { &self.text } else { &self.text[self.code().len()..] }
    }

    /// Its name where a table says who writes it: `community/users.rs`.
    fn room_and_file(&self) -> String {
        self.path.trim_start_matches("crates/").replacen("/src/", "/", 1)
    }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All files with this ending below some folders of the workspace.
fn sources(folders: &[&str], ending: &str) -> Vec<Source> {
    let root = workspace();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).expect("the sources are there");
            waiting.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if path.extension().is_some_and(|found| found == ending) {
            let inside = path.strip_prefix(&root).expect("a path of the workspace").display().to_string();
            found.push(Source { path: inside, text: fs::read_to_string(&path).expect("a source is text") });
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}

fn rust() -> Vec<Source> {
    sources(&["crates", "schema", "bench"], "rs")
}

/// The name that a text begins with.
fn first_name(text: &str) -> &str {
    let text = text.trim_start();
    let text = text.strip_prefix("therev.").unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// The files that the comment above a table names as its writers; `None`: it says nothing of them.
fn named_writers(comment: &str) -> Option<BTreeSet<String>> {
    let (_, said) = comment.split_once("Written by ")?;
    // One sentence; the full stop of a file's name is followed by its ending.
    let sentence = said.split(". ").next().unwrap_or(said);
    let words = sentence.split_whitespace().map(|word| word.trim_end_matches(['.', ',', ':', ';']));
    Some(words.filter(|word| word.contains('/')).map(str::to_owned).collect())
}

/// Whether every writer is named, by itself or by its folder, and every name is a writer's.
fn agree(named: &BTreeSet<String>, writers: &BTreeSet<String>) -> bool {
    let is = |name: &String, writer: &String| name == writer || (name.ends_with('/') && writer.starts_with(name));
    writers.iter().all(|writer| named.iter().any(|name| is(name, writer)))
        && named.iter().all(|name| writers.iter().any(|writer| is(name, writer)))
}

/// Every table of the schema with the writers that its SQL names.
fn tables() -> BTreeMap<String, Option<BTreeSet<String>>> {
    let mut tables = BTreeMap::new();
    for chapter in sources(&["schema"], "sql") {
        let mut comment = String::new();
        for line in chapter.text.lines() {
            if let Some(table) = line.strip_prefix("CREATE TABLE ") {
                let table = table.strip_prefix("IF NOT EXISTS ").unwrap_or(table);
                tables.insert(first_name(table).to_owned(), named_writers(&comment));
            }
            match line.strip_prefix("-- ") {
                Some(words) => comment.extend([words, " "]),
                None => comment.clear(),
            }
        }
    }
    tables
}

#[test]
fn each_table_is_written_by_whom_its_sql_names() {
    let tables = tables();
    assert!(tables.contains_key("users") && tables.contains_key("outbox"), "the schema was read");
    let mut writers: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for source in
        rust().iter().filter(|it| !it.path.contains("/tests/") && !BESIDE.iter().any(|b| it.path.starts_with(b)))
    {
        for verb in WRITES {
            for (at, _) in source.code().match_indices(&format!("{verb} ")) {
                let table = first_name(&source.code()[at + verb.len()..]);
                if let Some((table, _)) = tables.get_key_value(table) {
                    writers.entry(table).or_default().insert(source.room_and_file());
                }
            }
        }
    }
    let mut wrong = Vec::new();
    for (table, named) in &tables {
        let writers = writers.remove(table.as_str()).unwrap_or_default();
        match named {
            None => wrong.push(format!("{table}: say above it: Written by {writers:?}")),
            Some(named) if agree(named, &writers) => {}
            Some(named) => wrong.push(format!("{table}: names {named:?}, written by {writers:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_programs_read_the_environment() {
    let reads = |source: &&Source| source.text.contains("env::var") || source.text.contains(" env = \"");
    let found: BTreeSet<String> =
        rust().iter().filter(|it| !it.path.ends_with("/tidy.rs")).filter(reads).map(|it| it.path.clone()).collect();
    assert_eq!(found, READS_ENVIRONMENT.map(str::to_owned).into());
}

#[test]
fn no_test_waits_for_a_time() {
    // A fault of the nemesis lasts for a time, and a delay of its proxy: that is what they are.
    let exempt = |it: &&Source| {
        it.path.ends_with("/tidy.rs") || it.path.contains("/therev-nemesis/") || it.path.ends_with("/proxy.rs")
    };
    for source in rust().iter().filter(|it| !exempt(it)) {
        let tests = source.tests();
        assert!(!tests.contains("sleep("), "{}: a test waits for a condition, never for a time", source.path);
    }
}

/// A module of a test binary that nobody names is never compiled.
#[test]
fn no_file_of_tests_is_forgotten() {
    for source in rust().iter().filter(|it| it.path.contains("/tests/runner/")) {
        let (folder, file) = source.path.rsplit_once('/').expect("a file in a folder");
        let runner = fs::read_to_string(workspace().join(format!("{folder}.rs"))).expect("the folder has its binary");
        let module = file.trim_end_matches(".rs");
        assert!(runner.contains(&format!("\nmod {module};")), "{} is not part of {folder}.rs", source.path);
    }
}

/// The numbers in a line.
fn numbers(line: &str) -> impl Iterator<Item = u32> {
    line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok())
}

/// A rule that no test guards is a wish; a test that guards a rule which nobody wrote down is one more riddle.
#[test]
fn every_invariant_is_guarded_by_a_test_that_names_it() {
    let map = fs::read_to_string(workspace().join("ARCHITECTURE.md")).expect("the map of the code");
    let (_, invariants) = map.split_once("\n## Invariants\n").expect("its invariants");
    let (invariants, _) = invariants.split_once("\n## ").expect("what comes after them");
    let numbered = |line: &str| line.split_once(". **").and_then(|(number, _)| number.parse().ok());
    let known: BTreeSet<u32> = invariants.lines().filter_map(numbered).collect();
    assert!(known.len() >= 22, "the invariants were read");
    let sources = rust();
    let words = sources.iter().flat_map(|source| source.tests().lines()).map(str::trim_start);
    let named = words.filter(|line| line.starts_with("/// Invariant ") || line.starts_with("/// Invariants "));
    assert_eq!(named.flat_map(numbers).collect::<BTreeSet<u32>>(), known);
}
