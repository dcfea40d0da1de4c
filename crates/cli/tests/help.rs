//! All help in one snapshot: what changes for users is seen in review.

use crate::therev;

/// The help of a command and of everything below it.
fn collect(path: &[&str], into: &mut String) {
    let args: Vec<&str> = path.iter().copied().chain(["--help"]).collect();
    let output = therev(&args);
    assert!(output.status.success(), "{args:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let name: Vec<&str> = ["therev"].iter().chain(path).copied().collect();
    into.extend(["## ", &name.join(" "), "\n\n", text.trim_end(), "\n\n"]);
    let listed = text.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A command's name stands two columns in; what is wrapped stands further in.
    let named = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<&str> = named.filter_map(|line| line.split_whitespace().next()).collect();
    for name in names.into_iter().filter(|name| *name != "help") {
        let below: Vec<&str> = path.iter().copied().chain([name]).collect();
        collect(&below, into);
    }
}

#[test]
fn all_help() {
    let mut text = String::new();
    collect(&[], &mut text);
    let wide: Vec<&str> = text.lines().filter(|line| line.chars().count() > 100).collect();
    assert!(wide.is_empty(), "wider than a page: {wide:#?}");
    insta::assert_snapshot!("help", text);
}

#[test]
fn completions_and_the_manual_are_there() {
    for shell in ["bash", "zsh", "fish"] {
        let output = therev(&["completions", shell]);
        assert!(output.status.success() && String::from_utf8(output.stdout).unwrap().contains("therev"), "{shell}");
    }
    let manual = String::from_utf8(therev(&["man"]).stdout).unwrap();
    assert!(manual.contains(".TH therev") && manual.contains("THEREV_CONTROL_URL"));
}
