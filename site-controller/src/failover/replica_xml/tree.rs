//! Walking through an XML tree: the children of a name.

use xmltree::{Element, XMLNode};

pub fn elements<'a>(parent: &'a Element, name: &'a str) -> impl Iterator<Item = &'a Element> {
    parent.children.iter().filter_map(XMLNode::as_element).filter(move |element| element.name == name)
}

pub fn elements_mut<'a>(parent: &'a mut Element, name: &'a str) -> impl Iterator<Item = &'a mut Element> {
    let children = parent.children.iter_mut().filter_map(XMLNode::as_mut_element);
    children.filter(move |element| element.name == name)
}

pub fn remove_children(parent: &mut Element, name: &str) {
    parent.children.retain(|child| child.as_element().is_none_or(|element| element.name != name));
}
