//! The label that a failover puts on its replica: metadata of the domain that say under which generation it was brought up.
//! Promises: pure; what is no label of ours is none. Written by the site's failover, read by the agent's fence, and by
//! packaging/libvirt-hook.sh, which knows its form as libvirt prints it.

use super::XML_MAX;
use crate::units::Generation;
use xmltree::{Element, Namespace, XMLNode};

/// What tells our element from those of others.
const NAMESPACE: &str = "urn:lifeboat:replica:1";
const PREFIX: &str = "lifeboat";
const ELEMENT: &str = "replica";
const GENERATION: &str = "generation";

/// The generation of the failover that made this domain, if one did.
pub fn of(xml: &str) -> Option<Generation> {
    if xml.len() > XML_MAX {
        return None;
    }
    let root = Element::parse(xml.as_bytes()).ok()?;
    let labels = root.get_child("metadata")?.children.iter().filter_map(XMLNode::as_element);
    let label = labels.into_iter().find(|element| is_label(element))?;
    label.attributes.get(GENERATION)?.parse().ok().map(Generation)
}

/// Takes the label off a domain: it is a copy's, and none of what is made from it.
pub fn take_off(domain: &mut Element) {
    if let Some(metadata) = domain.get_mut_child("metadata") {
        metadata.children.retain(|child| !child.as_element().is_some_and(is_label));
    }
}

/// Puts it on a domain, in place of one that it had.
pub fn put_on(domain: &mut Element, generation: Generation) {
    take_off(domain);
    let mut label = Element::new(ELEMENT);
    let mut names = Namespace::empty();
    names.put(PREFIX, NAMESPACE);
    (label.prefix, label.namespace) = (Some(PREFIX.into()), Some(NAMESPACE.into()));
    label.namespaces = Some(names);
    label.attributes.insert(GENERATION.into(), generation.to_string());
    match domain.get_mut_child("metadata") {
        Some(metadata) => metadata.children.push(XMLNode::Element(label)),
        None => {
            let mut metadata = Element::new("metadata");
            metadata.children.push(XMLNode::Element(label));
            domain.children.push(XMLNode::Element(metadata));
        }
    }
}

fn is_label(element: &Element) -> bool {
    element.name == ELEMENT && element.namespace.as_deref() == Some(NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(domain: &Element) -> String {
        let mut out = Vec::new();
        domain.write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_label_is_put_on_replaced_and_taken_off_and_what_others_keep_there_stays() {
        let theirs = "<metadata><o:x xmlns:o='urn:other' a='1'/></metadata>";
        for metadata in ["", "<metadata/>", theirs] {
            let xml =
                format!("<domain><name>web</name>{metadata}<description>replica</description></domain>");
            let mut domain = Element::parse(xml.as_bytes()).unwrap();
            assert_eq!(of(&xml), None);
            for generation in [2, 4] {
                put_on(&mut domain, Generation(generation));
                let text = written(&domain);
                assert_eq!(of(&text), Some(Generation(generation)), "{text}");
                assert_eq!(text.matches("generation=").count(), 1, "{text}");
                assert_eq!(text.contains("urn:other"), metadata == theirs, "{text}");
            }
            take_off(&mut domain);
            assert_eq!(of(&written(&domain)), None);
            assert_eq!(written(&domain).contains("urn:other"), metadata == theirs);
        }
    }

    #[test]
    fn what_only_looks_like_a_label_is_none() {
        let ours = "xmlns:lifeboat='urn:lifeboat:replica:1'";
        let label = format!("<lifeboat:replica {ours} generation='4'/>");
        for wrong in [
            "<metadata><replica generation='4'/></metadata>".to_owned(),
            "<metadata><l:replica xmlns:l='urn:other' generation='4'/></metadata>".to_owned(),
            format!("<metadata><lifeboat:replica {ours}/></metadata>"),
            format!("<metadata><lifeboat:replica {ours} generation='-4'/></metadata>"),
            format!("<metadata><a>{label}</a></metadata>"),
            format!("<devices>{label}</devices>"),
            "<description>&lt;lifeboat:replica generation='4'/&gt;</description>".to_owned(),
        ] {
            assert_eq!(of(&format!("<domain>{wrong}</domain>")), None, "{wrong}");
        }
        assert_eq!(of(&format!("<domain><metadata>{label}</metadata></domain>")), Some(Generation(4)));
        assert_eq!(of("no XML"), None);
    }
}
