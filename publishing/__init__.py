"""Models and adapters on the Hub: conversion, cards and pushes."""
