"""What an adapter learned and where it errs: spectra, reports, pictures."""
