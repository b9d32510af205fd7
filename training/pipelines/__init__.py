"""A pipeline of Kubeflow Pipelines (KFP 2) that trains, evaluates and registers the census model."""
