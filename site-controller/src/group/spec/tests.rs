//! What a group may say, and what is refused with its key.

use super::*;
use proptest::prelude::*;

fn steps(after: &[&str], wait_for: &[&str]) -> VmSteps {
    let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    VmSteps { after: owned(after), wait_for: owned(wait_for), ..VmSteps::default() }
}

#[test]
fn what_is_left_out_has_a_value_and_what_cannot_be_acted_on_is_refused_with_its_key() {
    let shop = GroupSpec::new("shop", &["web", "db"]);
    shop.check().unwrap();
    assert_eq!(shop.interval(), Duration::from_millis(2500));
    let read: GroupSpec = serde_json::from_str("{\"name\":\"shop\",\"vms\":[\"web\",\"db\"]}").unwrap();
    assert_eq!(read, shop);
    type Change = fn(&mut GroupSpec);
    let cases: [(Change, &str); 14] = [
        (|spec| spec.name = "a/b".into(), "name"),
        (|spec| spec.name = "-rf".into(), "name"),
        (|spec| spec.vms.clear(), "vms"),
        (|spec| spec.vms.push("web".into()), "vms"),
        (|spec| spec.rpo = "soon".into(), "rpo"),
        (|spec| spec.rpo = "1ms".into(), "rpo"),
        (|spec| spec.keep = Some(vec!["some".into()]), "keep"),
        (|spec| spec.runbook.undo_window = "later".into(), "undo_window"),
        (|spec| spec.drill.every = Some("often".into()), "drill.every"),
        (|spec| drop(spec.runbook.vm.insert("mail".into(), VmSteps::default())), "mail"),
        (|spec| drop(spec.runbook.vm.insert("web".into(), steps(&[], &["tcp::80"]))), "wait_for"),
        (|spec| drop(spec.runbook.networks.insert("lan".into(), "lan2".into())), "networks.lan"),
        (|spec| boots(spec, "delay:1s", true), "boot_if_not_up"),
        (|spec| boots(spec, "agent", false), "`cold_boot` is false"),
    ];
    for (change, key) in cases {
        let mut spec = shop.clone();
        change(&mut spec);
        let error = spec.check().unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

fn boots(spec: &mut GroupSpec, wait: &str, cold_boot: bool) {
    let steps = VmSteps { boot_if_not_up: true, ..steps(&[], &[wait]) };
    spec.runbook.vm.insert("web".into(), steps);
    spec.runbook.cold_boot = cold_boot;
}

#[test]
fn members_start_after_those_that_they_wait_for_and_a_circle_is_refused() {
    let mut spec = GroupSpec::new("shop", &["web", "db", "mail"]);
    spec.runbook.vm.insert("web".into(), steps(&["db"], &["console:ready: yes", "delay:1s"]));
    assert_eq!(spec.starts().unwrap(), [vec!["db", "mail"], vec!["web"]]);
    let (waits, at_most) = spec.waits("web").unwrap();
    let console = WaitFor::Console("ready: yes".into());
    assert_eq!((waits, at_most.as_secs()), (vec![console, WaitFor::Delay(Duration::from_secs(1))], 120));
    let mut smaller = spec.clone();
    smaller.let_go(&["db".into()]);
    smaller.check().unwrap();
    assert!(smaller.runbook.vm["web"].after.is_empty(), "nobody is waited for who has left");
    spec.runbook.vm.insert("db".into(), steps(&["web"], &[]));
    let error = spec.check().unwrap_err().to_string();
    assert!(error.contains("web, db") || error.contains("db, web"), "{error}");
}

#[test]
fn drills_are_due_when_their_time_has_passed_and_it_is_their_hour() {
    let every = |text: &str| DrillSpec { every: Some(text.into()), ..DrillSpec::default() }.every();
    let (utc, hour) = (Zone::utc(), 3_600_000);
    let day = 24 * hour;
    let weekly = every("7d").unwrap().unwrap();
    let due = |every: Every, last: u64, now: u64| every.is_due(UnixMs(last), UnixMs(now), &utc);
    assert!(!due(weekly, 0, 7 * day - 1) && due(weekly, 0, 7 * day));
    let at_three = every("7d at 03:00").unwrap().unwrap();
    let begun = 3 * hour + 60_000;
    assert!(due(at_three, begun, 7 * day + 3 * hour), "a minute late last time is no day late this time");
    assert!(!due(at_three, begun, 7 * day + 4 * hour) && !due(at_three, begun, 6 * day + 3 * hour));
    assert!(due(at_three, begun, 8 * day + 3 * hour), "a day that was missed is made up for");
    for bad in ["often", "7d at noon", "1h at 03:00", "5s", "7d at 25:00"] {
        assert!(every(bad).is_err(), "{bad}");
    }
    assert_eq!(DrillSpec::default().every(), Ok(None));
}

#[test]
fn waits_are_read_as_they_are_written() {
    let tcp = |host: Option<&str>, port| Some(WaitFor::Tcp { host: host.map(Into::into), port });
    assert_eq!(parse_wait("agent"), Some(WaitFor::Agent));
    assert_eq!(parse_wait("tcp:80"), tcp(None, 80));
    assert_eq!(parse_wait("tcp:db.lan:5432"), tcp(Some("db.lan"), 5432));
    for given in ["agent", "tcp:80", "tcp:db.lan:5432", "console:up: yes", "delay:5s", "delay:1500ms"] {
        assert_eq!(parse_wait(given).unwrap().to_string(), given);
    }
    for bad in ["", "agents", "tcp:", "tcp:0", "tcp:x:70000", "console:", "delay:soon", "udp:53"] {
        assert_eq!(parse_wait(bad), None, "{bad}");
    }
}

proptest! {
    #[test]
    fn any_order_without_a_circle_starts_everybody_once_and_nobody_too_early(
        edges in proptest::collection::vec((0usize..8, 0usize..8), 0..16),
    ) {
        let names: Vec<String> = (0..8).map(|no| format!("vm{no}")).collect();
        let mut spec = GroupSpec::new("g", &names.iter().map(String::as_str).collect::<Vec<_>>());
        for (a, b) in edges.into_iter().filter(|(a, b)| a != b) {
            // Only towards lower numbers: no circle.
            let (later, before) = (a.max(b), a.min(b));
            spec.runbook.vm.entry(names[later].clone()).or_default().after.push(names[before].clone());
        }
        let rows = spec.starts().unwrap();
        let row_of = |vm: &String| rows.iter().position(|row| row.contains(vm)).unwrap();
        prop_assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), names.len());
        for (vm, steps) in &spec.runbook.vm {
            prop_assert!(steps.after.iter().all(|before| row_of(before) < row_of(vm)));
        }
    }
}
