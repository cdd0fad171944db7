from __future__ import annotations
def first_text_encoder(clip):
    from transformers import CLIPTextModelWithProjection
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith(("text_model.","text_projection."))})
    return encoder.eval().requires_grad_(False)
