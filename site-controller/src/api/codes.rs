//! The codes of errors, which programs may rely on: what each means. They stand in the document of the API.

/// A code that was given once keeps its meaning.
pub const CODES: &[(&str, &str)] = &[
    ("ambiguous", "several VMs are called so; name it by its UUID"),
    ("audit-unavailable", "the call could not be written down, and was not made"),
    ("bad-group", "what was given is no group that could be made"),
    ("bad-name", "what was given can be no name"),
    ("bad-request", "what was sent could not be read"),
    ("bad-time", "what was given is no time"),
    ("busy", "somebody else is at it just now; ask again"),
    ("called-off", "a planned failover was called off; the sources go on"),
    ("conflict", "it makes sense, but not as things stand"),
    ("damaged", "the point can't be restored; nothing was changed"),
    ("disks", "the disks that were named can't be taken in"),
    ("forbidden", "the caller's role does not allow it"),
    ("handover", "the VM can't be handed over as things stand"),
    ("held", "somebody else has the VM"),
    ("in-a-group", "the VM is in a group, which is acted on as a whole"),
    ("internal", "the controller could not do it; its log says more"),
    ("no-witness", "the site has no witness, without which it does nothing by itself"),
    ("no-host", "no host can take the replica, or the one that may have it does not answer"),
    ("no-point", "there is no such point"),
    ("not-found", "there is no such VM or point"),
    ("not-kept", "no agent keeps the VM at the witness"),
    ("not-possible", "it can't be done as things stand"),
    ("point-of-planned", "a planned failover makes a point of its own, and takes no other"),
    ("preflight", "the failover would not work, and nothing was changed"),
    ("too-large", "the request has too many bytes"),
    ("too-slow", "the request did not come in time"),
    ("unauthorized", "no token that is good for anything was shown"),
    ("unknown-drill", "there is no such drill"),
    ("unknown-group", "there is no such group"),
    ("unknown-request", "there is no such request"),
    ("unknown-token", "there is no such token"),
    ("unknown-vm", "there is no such VM"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs, path::Path};

    /// Method: what is given to an `ApiError` in the sources of the API.
    #[test]
    fn every_code_that_is_answered_is_listed_with_its_meaning() {
        let own = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
        let mut text = String::new();
        for folder in ["src/api", "../src/local_api"] {
            let mut files: Vec<_> = fs::read_dir(Path::new(&own).join(folder)).unwrap().flatten().collect();
            files.retain(|file| file.path().extension().is_some_and(|kind| kind == "rs"));
            text.extend(files.iter().map(|file| fs::read_to_string(file.path()).unwrap()));
        }
        let mut given = BTreeSet::from(["internal".to_owned()]);
        for call in ["::not_found(", "::bad_request(", "::conflict(", "::new("] {
            for rest in text.split(&format!("ApiError{call}")).skip(1) {
                // Between the call and the code stands a status at the most.
                let near = |before: &str| before.split_whitespace().map(str::len).sum::<usize>() < 40;
                let before = rest.split_once('"').filter(|(before, _)| near(before) && !before.contains(';'));
                let Some((_, after)) = before else { continue };
                given.extend(after.split_once('"').map(|(code, _)| code.to_owned()));
            }
        }
        let listed: BTreeSet<String> = CODES.iter().map(|(code, _)| (*code).to_owned()).collect();
        assert_eq!(CODES.len(), listed.len());
        assert!(given.len() > 15, "the sources are read: {given:?}");
        assert_eq!(given, listed);
    }
}
