//! The nemesis, for as long as a test may take; `therev-nemesis --faults 2000` is the same for an hour.

use std::process::Command;

/// As many as end within a minute and a half.
const FAULTS: &str = "30";

/// Invariants 1, 6, 12 and 14.
#[test]
fn a_few_faults() {
    let output = Command::new(env!("CARGO_BIN_EXE_therev-nemesis"))
        .args(["--faults", FAULTS, "--seed", "1", "--pg-bin"])
        .arg(&testkit::test_servers().pg_bin)
        .output()
        .expect("the nemesis runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let line = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value =
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}\n{said}"));
    let none = ["lost", "doubled", "left_over"].iter().all(|key| summary[key] == 0);
    assert!(output.status.success() && none, "{line}\n{said}");
    let skipped = summary["skipped"].as_u64().unwrap_or(0);
    assert_eq!(
        summary["faults"].as_u64().map(|faults| (faults + skipped).to_string()).as_deref(),
        Some(FAULTS),
        "{line}"
    );
    assert_eq!(summary["seed"], 1);
    assert!(summary["acknowledged"].as_u64() > Some(100) && summary["reads"].as_u64() > Some(20), "{line}\n{said}");
    assert!(summary["relocations"].as_u64() > Some(0), "{line}\n{said}");
    if skipped > 0 {
        println!("{skipped} faults were skipped:\n{said}");
    }
}
