//! The document holds every route, and the one in the tree is the one that is served.

use crate::api::routes;
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::Path};

fn references(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            into.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|field| references(field, into));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, into)),
        _ => {}
    }
}

#[test]
fn every_route_is_in_the_document_with_its_role_and_its_shapes() {
    let document = routes::document();
    let mut ids = BTreeSet::new();
    for route in routes::table() {
        let (rule, shape) = (route.rule, route.shape);
        let operation = &document["paths"][rule.path][rule.method.to_ascii_lowercase()];
        let hint = format!("{rule:?}: say what it takes and gives in the table: {operation}");
        assert_eq!(operation["x-role"], json!(rule.role), "{hint}");
        assert_eq!(operation["x-mutating"], rule.mutating, "{hint}");
        assert!(shape.gives.is_some() && !shape.summary.is_empty(), "{hint}");
        assert_eq!(operation["requestBody"].is_object(), shape.takes.is_some(), "{hint}");
        assert!(shape.takes.is_none() || rule.method == "POST", "{hint}");
        assert!(ids.insert(operation["operationId"].to_string()), "{hint}");
    }
    let mut named = BTreeSet::new();
    references(document, &mut named);
    assert!(named.len() > 20, "{named:?}");
    for reference in named {
        let name = reference.strip_prefix("#/components/schemas/").unwrap();
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
        assert!(
            !name.ends_with(|last: char| last.is_ascii_digit()),
            "two types are called {name}: rename one"
        );
    }
}

/// To write it anew: `LIFEBOAT_WRITE=1 cargo test openapi`.
#[test]
fn the_document_in_the_tree_is_the_one_that_is_served() {
    let own = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
    let file = Path::new(&own).join("../docs/openapi.json");
    if std::env::var_os("LIFEBOAT_WRITE").is_some() {
        fs::write(&file, serde_json::to_string_pretty(routes::document()).unwrap() + "\n").unwrap();
    }
    let kept: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert!(
        kept == *routes::document(),
        "docs/openapi.json is not what is served; `LIFEBOAT_WRITE=1 cargo test openapi` writes it"
    );
}
