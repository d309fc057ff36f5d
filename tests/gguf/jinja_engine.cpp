// Renders a template with llama.cpp's own Jinja engine: TEMPLATE VARIABLES (JSON), both files.
#include "jinja/caps.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "jinja/value.h"
#include "json.h"

#include <fstream>
#include <iostream>
#include <sstream>

static std::string read(const char * path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

int main(int, char ** arguments) {
    try {
        jinja::lexer lexer;
        auto tokens = lexer.tokenize(read(arguments[1]));
        auto program = jinja::parse_from_tokens(tokens);
        jinja::context context(tokens.source);
        jinja::global_from_json(context, common_json::parse(read(arguments[2])), true);
        jinja::runtime runtime(context);
        std::cout << jinja::runtime::gather_string_parts(runtime.execute(program))->as_string().str();
        std::cerr << jinja::caps_get(program).to_string();
    } catch (const std::exception & error) {
        std::cerr << error.what();
        return 1;
    }
}
