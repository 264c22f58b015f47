//! The API's document (OpenAPI 3.1), made of the table of routes and of the types that they take and give: served as
//! `/openapi.json`, and kept in docs/openapi.json. The one home of schemars' generator.

use super::{codes::CODES, gate::Rule};
use lifeboat::local_api::Envelope;
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

type Of = fn(&mut SchemaGenerator) -> Schema;

/// What a route takes and gives.
#[derive(Clone, Copy, Default)]
pub struct Shape {
    summary: &'static str,
    /// Of the query.
    asks: Option<Of>,
    takes: Option<Of>,
    gives: Option<Of>,
    /// The answer comes line by line.
    streams: bool,
}

impl Shape {
    pub(super) fn asks<T: JsonSchema>(self) -> Self {
        Self { asks: Some(|of| of.subschema_for::<T>()), ..self }
    }
    pub(super) fn takes<T: JsonSchema>(self) -> Self {
        Self { takes: Some(|of| of.subschema_for::<T>()), ..self }
    }
    pub(super) fn gives<T: JsonSchema>(self, summary: &'static str, streams: bool) -> Self {
        Self { summary, streams, gives: Some(|of| of.subschema_for::<T>()), ..self }
    }
}

/// The whole document.
pub(super) fn document(routes: &[(Rule, Shape)]) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut schemas = settings.into_generator();
    let error = schemas.subschema_for::<Envelope>();
    let mut paths = Map::new();
    for (rule, shape) in routes {
        let operation = operation(rule, shape, &error, &mut schemas);
        let path = paths.entry(rule.path).or_insert_with(|| json!({}));
        path[rule.method.to_ascii_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Lifeboat site controller",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0 OR MIT", "identifier": "Apache-2.0 OR MIT" },
            "description": "Everything that `lifeboat` does. Times are milliseconds since 1970 UTC; sizes are bytes. \
                Each operation says as `x-role` which role it asks for at least, as `x-mutating` whether it changes \
                something and is written to the audit log.",
        },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "schemas": schemas.take_definitions(true),
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
        },
        "x-error-codes": CODES.iter().map(|(code, meaning)| ((*code).to_owned(), json!(meaning))).collect::<Map<_, _>>(),
    })
}

fn operation(rule: &Rule, shape: &Shape, error: &Schema, schemas: &mut SchemaGenerator) -> Value {
    let kind = if shape.streams { "application/x-ndjson" } else { "application/json" };
    let given = shape.gives.map_or_else(|| json!({}), |of| of(schemas).to_value());
    let mut parameters: Vec<Value> = segments(rule.path)
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .collect();
    parameters.extend(shape.asks.into_iter().flat_map(|of| query(of, schemas)));
    let described =
        if shape.streams { "One JSON value a line; the last is the result, or an error." } else { "Done." };
    let mut operation = json!({
        "operationId": id(rule),
        "summary": shape.summary,
        "x-role": rule.role,
        "x-mutating": rule.mutating,
        "parameters": parameters,
        "responses": {
            "200": { "description": described, "content": { kind: { "schema": given } } },
            "default": {
                "description": "It was not done. `code` is one of `x-error-codes`.",
                "content": { "application/json": { "schema": error } },
            },
        },
    });
    if let Some(of) = shape.takes {
        operation["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": of(schemas) } } });
    }
    operation
}

/// The fields of what is asked in the query, as parameters.
fn query(of: Of, schemas: &mut SchemaGenerator) -> Vec<Value> {
    let reference = of(schemas).to_value();
    let name = reference["$ref"].as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let schema = schemas.definitions().get(name).cloned().unwrap_or_default();
    let fields = schema["properties"].as_object().cloned().unwrap_or_default();
    fields
        .into_iter()
        .map(|(name, schema)| json!({ "name": name, "in": "query", "required": false, "schema": schema }))
        .collect()
}

/// `{vm}` of `/v1/vms/{vm}/points`.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
}

/// `get-vms-vm-points`
fn id(rule: &Rule) -> String {
    let words = rule.path.split('/').filter(|word| !word.is_empty() && *word != "v1");
    let words: Vec<&str> = words.map(|word| word.trim_matches(['{', '}'])).collect();
    format!("{}-{}", rule.method.to_ascii_lowercase(), words.join("-").replace('.', "-"))
}

#[cfg(test)]
mod tests;
