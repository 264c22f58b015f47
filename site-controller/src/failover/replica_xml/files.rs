//! The files that a definition names, whatever for. Pure. Called by `folders`.

use super::XmlError;
use std::path::PathBuf;
use xmltree::Element;

/// Every absolute path in it: disks and what they are based on, firmware, kernels, consoles.
pub fn files(xml: &str) -> Result<Vec<PathBuf>, XmlError> {
    let domain = Element::parse(xml.as_bytes()).map_err(|error| XmlError::Malformed(error.to_string()))?;
    let (mut found, mut left) = (Vec::new(), vec![&domain]);
    while let Some(element) = left.pop() {
        let text = element.get_text();
        let words = element.attributes.values().map(String::as_str).chain(text.as_deref());
        found.extend(words.map(str::trim).filter(|word| word.starts_with('/')).map(PathBuf::from));
        left.extend(element.children.iter().filter_map(|child| child.as_element()));
    }
    Ok(found)
}
