"""From a recipe to a merged model: plan, pipeline, output."""
