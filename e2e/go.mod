module github.com/monotel/monotel/e2e

go 1.26.0
