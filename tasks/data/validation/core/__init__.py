"""Pure: row rules, text repairs, personal data, languages, drift, proposed limits."""
