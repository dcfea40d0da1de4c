//! Rows read column by column, in the order in which they were asked for.

use crate::error::{Error, Result};
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::FromSql;

/// A row whose columns are mostly taken in their order: the next one is looked at first, so that a page of rows does not
/// compare every name with every other.
pub(crate) struct Columns<'r> {
    row: &'r Row,
    next: usize,
}

impl<'r> Columns<'r> {
    pub(crate) fn of(row: &'r Row) -> Columns<'r> {
        Columns { row, next: 0 }
    }

    /// The column of this name.
    pub(crate) fn get<T: FromSql<'r>>(&mut self, name: &str) -> T {
        let at = self.find(name);
        self.row.get(at)
    }

    /// The same of JSON. A number or a depth that this program cannot read, which only others can have written, is the error.
    pub(crate) fn json(&mut self, name: &str) -> Result<Value> {
        let at = self.find(name);
        self.row.try_get(at).map_err(|error| Error::invalid("row", format!("its {name} cannot be read: {error}")))
    }

    fn find(&mut self, name: &str) -> usize {
        let columns = self.row.columns();
        let at = match columns.get(self.next) {
            Some(next) if next.name() == name => self.next,
            _ => columns.iter().position(|column| column.name() == name).unwrap_or(columns.len()),
        };
        self.next = at + 1;
        at
    }
}
