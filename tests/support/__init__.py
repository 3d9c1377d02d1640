"""What several test files need: servers, faults, planted reports and releases."""
