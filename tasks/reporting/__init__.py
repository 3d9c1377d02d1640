"""What a run shows: `mlflow_run.record_run`, `html_report.write_html_report`, `prefect_artifacts`, tables and plots."""
