"""Stage 6: a model behind an autoscaled HTTP endpoint in the shape of OpenAI's images API.

    HTTP ─▶ ingress.py (api.py, web.py) ─ messages.py ─▶ sampler.py (model, batcher.py) ─▶ PNG

`app.py` puts the two deployments together, `serve_model.py` is what `ldm serve` calls.
"""
