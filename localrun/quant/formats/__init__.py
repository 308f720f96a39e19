"""Number formats: conversion from a checkpoint's to ggml's, and quantizers."""
