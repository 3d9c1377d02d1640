"""What commands print: tables and pages from reports, and the same as JSON in `payloads`."""
