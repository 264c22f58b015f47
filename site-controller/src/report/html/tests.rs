//! The page of a report, for whatever names and figures it is made of: nothing in it is markup but ours, every tag is closed,
//! and it needs nothing from elsewhere. Called by the test runner.

use super::{
    super::{
        age::{Asked, Moment},
        points::{self, tests::point},
        rpo::attained,
    },
    *,
};
use lifeboat::format::manifest::Consistency::Memory;

fn report() -> Report {
    let all: Vec<_> = (1..=4).map(|seq| point(1, seq, Memory)).collect();
    let moments: Vec<Moment> = all
        .iter()
        .map(|point| Moment {
            cut_at: point.cut_at,
            durable_at: point.committed_at,
            no: point.seq.0,
            era: 0,
            at_rest: false,
        })
        .collect();
    let asked = Asked { since: UnixMs(0), until: UnixMs(9000), target_ms: Some(1500) };
    let failover = Failover {
        what: What::Undo,
        outcome: Outcome::Ran,
        point: None,
        cut_at: Some(UnixMs(1000)),
        started_at: UnixMs(5000),
        running_at: Some(UnixMs(6000)),
        rpo_ms: Some(4000),
        rto_ms: Some(1000),
        resumed: Some(false),
        host: Some("<kvm2>".into()),
        notes: vec!["<script>alert('1')</script> & \"\u{1b}[31m\"".into()],
    };
    let subject = Subject {
        name: "<b>web</b>".into(),
        is_group: false,
        group: Some("shop".into()),
        members: Vec::new(),
        target_ms: Some(1500),
        points: points::of_vm(&all, UnixMs(0)),
        rpo: attained(&moments, &[], asked, UnixMs(9000)),
        drill_every: Some("7d".into()),
        drills: Vec::new(),
        failovers: vec![failover],
        readiness: None,
    };
    Report {
        version: Report::VERSION,
        site: "berlin".into(),
        release: "0".into(),
        made_at: UnixMs(9000),
        since: UnixMs(0),
        subjects: vec![subject],
        limits: vec!["clocks <differ>".into()],
    }
}

#[test]
fn whatever_a_guest_is_called_or_says_is_text_on_the_page() {
    let page = page(&report());
    assert!(page.contains("&lt;b&gt;web&lt;/b&gt;") && !page.contains("<b>"), "{page}");
    assert!(page.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;\u{fffd}[31m&quot;"));
    let scripts = ["<script", "javascript:", "onload", "http://", "https://", "<img", "<link", "<iframe"];
    assert_eq!(scripts.iter().filter(|of| page.contains(**of)).count(), 0, "{page}");
}

#[test]
fn the_page_has_the_figures_and_says_what_is_not_known() {
    let page = page(&report());
    // Known from 1.1 s to 9 s: to 2.1, 3.1 and 4.1 within; then 1.4 s of 4.9.
    for said in [
        "55.696 %",
        "before the oldest point that is kept",
        "5.000 s",
        "undo",
        "booted",
        "clocks &lt;differ&gt;",
    ] {
        assert!(page.contains(said), "{said}: {page}");
    }
    for tag in ["table", "section", "ul", "tbody", "thead", "body", "html"] {
        let (open, close) =
            (page.matches(&format!("<{tag}")).count(), page.matches(&format!("</{tag}>")).count());
        assert_eq!(open, close, "{tag}");
    }
}

#[test]
fn spans_are_told_as_exactly_as_they_matter() {
    let told = [(1234, "1.234 s"), (61_500, "61.5 s"), (3_600_000, "60 min 0 s"), (90_000_000, "25 h 0 min")];
    for (ms, said) in told {
        assert_eq!(span(ms), said);
    }
    assert_eq!(span(30 * 86_400_000), "30 d 0 h");
}
