"""`granite-switch play`: a page on this machine to try a model on. The extra `play` brings what it needs (Gradio).

`session` is a conversation with what was measured of it, `views` says it in HTML, `page` binds both to Gradio; `local`
and `remote` are the two engines. Only `page` imports Gradio, only `local` imports torch.
"""
