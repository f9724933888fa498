"""Serving: Ray Serve hosts vLLM behind the OpenAI routes, every token watched by METIS.

`app` turns settings into Ray's own LLM configuration, `deployment` holds the replica and the ingress,
`body_guard` and `exposition` are their pure helpers, `lifecycle` brings an application up and takes it down,
`client` talks to it.
"""
