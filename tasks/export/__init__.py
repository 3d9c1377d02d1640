"""Export a version as files that were measured against the live model: `request.export_source`, `steps`, `card.write_card`."""
