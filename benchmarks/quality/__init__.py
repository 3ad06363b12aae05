"""What the study of plan quality needs: models, cases, kept results, figures."""
